"""Files of what a run's models say of every image, and of what is measured from it.

evaluation/[<stage>/]predictions-<last|best>-<test|val>.npz    see aggregation/predictions.py
evaluation/[<stage>/]measures.json                             by model, split and member, see `measures`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from aggregation.predictions import Predictions, measures
from orchestration.storage.files import write_atomic

MEASURES = "measures.json"


def write_predictions(
    folders: Sequence[Path], kept: Mapping[str, Mapping[str, Predictions]], num_classes: int, *, probabilities: bool
) -> None:
    """Write the predictions of models on splits, and their measures.

    Args:
        folders: that get all of it.
        kept: by model, "last" or "best", and split.
        num_classes, probabilities: as for `measures`.
    """
    measured = {
        which: {split: measures(one, num_classes, probabilities=probabilities) for split, one in splits.items()}
        for which, splits in kept.items()
    }
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for which, splits in kept.items():
            for split, one in splits.items():
                write_atomic(file_of(folder, which, split), one.packed())
        write_atomic(folder / MEASURES, json.dumps(measured, indent=1) + "\n")


def file_of(folder: Path, which: str, split: str) -> Path:
    """Return the file of a model's predictions on a split; `folder` is evaluation/, or a stage's below it."""
    return folder / f"predictions-{which}-{split}.npz"
