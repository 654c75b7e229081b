"""Files of what a run's models say of every image, and of what is measured from it.

evaluation/[<stage>/]predictions-<last|best>-<test|val>.npz    see aggregation/predictions.py
evaluation/[<stage>/]measures.json                             by model, split and member, see `measures`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aggregation.predictions import Predictions, measures
from orchestration.storage.files import write_json, writing_whole

MEASURES = "measures.json"


def write_predictions(
    folders: Sequence[Path],
    kept: Iterable[tuple[Sequence[str], str, Predictions]],
    num_classes: int,
    *,
    probabilities: bool,
) -> None:
    """Write the predictions of models on splits, each before the next is asked for, and their measures.

    Args:
        folders: that get all of it.
        kept: models that say the same, of "last" and "best"; a split; what they say of it.
        num_classes, probabilities: as for `measures`.
    """
    measured: dict[str, dict[str, Any]] = {}
    for models, split, one in kept:
        found = measures(one, num_classes, probabilities=probabilities)
        for which in models:
            measured.setdefault(which, {})[split] = found
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                with writing_whole(file_of(folder, which, split)) as file:
                    one.write(file)
        del one  # before the next is made: each may be large
    for folder in folders:
        write_json(folder / MEASURES, measured)


def file_of(folder: Path, which: str, split: str) -> Path:
    """Return the file of a model's predictions on a split; `folder` is evaluation/, or a stage's below it."""
    return folder / f"predictions-{which}-{split}.npz"
