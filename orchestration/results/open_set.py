"""A saved run on images of no known class: F-measure, AUROC and accuracy with a threshold, table, picture, numbers.

Known images are those of a split; unknown ones come from a folder or a list. The ensemble and its experts score both
once, as during training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aggregation.open_set import State, open_set
from aggregation.tally import Tally
from experts.batches import Replica
from experts.data.images import FileImages
from experts.data.unknown import open_unknown
from experts.eval_batches import EvalBatches
from orchestration.results.saved_run import SavedRun, open_run, same_threads, stages_to_measure
from orchestration.results.style import LAST, new_figure, picture_style, save_figure, set_figure_title
from orchestration.results.tables import CLASS_GROUPS, shown_members
from orchestration.results.text import decimals, text_table

_BINS = 50  # of the picture
_UNKNOWN = "#b8323f"


def evaluate_open_set(
    run: str,
    unknown: str,
    threshold: float,
    which: str | None,
    split: str,
    overrides: list[str],
    stage: str | None = None,
) -> str:
    """Measure a run on a split and on images of no known class. Save evaluation/open-<which>-<split>.json.

    The picture is report/open-<which>-<split>.png. Where the recipe has several final stages, both lie in a folder of
    the stage.

    Args:
        run: the run folder.
        unknown: a folder of images, or a text file of paths.
        threshold: an image whose highest probability is below it is predicted to be unknown.
        which: which of the run's models, "best" or "last"; None for both.
        split: "test" or "val", the known images.
        overrides: `a.b=value` for keys of MAY_DIFFER.
        stage: the final stage to measure; None for all.

    Returns:
        A table of ensemble and experts, and the files.

    Raises:
        ValueError: the threshold is not in [0, 1]; there are no such images; or as `reevaluate`.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold {threshold:g}: needed a probability from 0 to 1; published 0.1")
    rows, files = [], []
    saved: SavedRun | None = None
    store: FileImages | None = None
    for final in stages_to_measure(run, stage):
        for name in ("last", "best") if which is None else (which,):
            # The data is opened once, the models in turn.
            saved = open_run(run, name, split, overrides, final) if saved is None else saved.with_model(name, final)
            store = open_unknown(unknown, saved.dataset.config) if store is None else store
            with same_threads(saved.config):
                known, others = _states(saved, None), _states(saved, store)
            found = open_set(known, others, saved.data["counts"], saved.cuts, threshold)
            result = saved.origin() | {"unknown": str(Path(unknown).expanduser().absolute())} | found
            rows += _rows(result, name, final)
            files += [_draw(saved, name, result, known, others), saved.save(f"open-{name}-{split}", result)]
    assert saved is not None and store is not None
    head = (
        f"{saved.folder.name}: {len(saved.store):,} images of known classes ({split}), {len(store):,} of none; an "
        f"image whose highest probability is below {threshold:g} is predicted to be unknown"
    )
    least = 1 / saved.dataset.num_classes
    idle = f"The highest of {saved.dataset.num_classes} probabilities is never below {least:g}: nothing is rejected."
    notes = (*_NOTES, idle) if threshold <= least else _NOTES
    return "\n".join([head, "", *_table(rows), "", *notes, "", *files])


@torch.no_grad()
def _states(saved: SavedRun, unknown: FileImages | None) -> State:
    """Score the split, or other images, as a worker does during training."""
    batches = saved.batches()
    if unknown is not None:
        size = saved.config.evaluation_batch_size(saved.device.type)
        replica = Replica(device=saved.device, dtype=saved.dtype)
        batches = EvalBatches(unknown, saved.dataset.config, size, replica)
    tally = Tally(saved.model.aggregator, saved.model.description.expert_names)
    for images_B3HW, labels_B in batches:
        tally.add(saved.outputs(images_B3HW), labels_B)
    return tally.states()[0]


# Table and picture

_NOTES = (
    "precision: known images with their class, of all known; recall: the same, of these and of the unknown images that",
    "got a class; F: of both, as published. AUROC: of the highest probability, known above unknown.",
    "Top-1: of known images, where a rejection is wrong; groups by number of training images.",
)


def _rows(result: Mapping[str, Any], which: str, stage: str) -> list[list[str]]:
    rows = []
    for member in shown_members(result["members"]):
        found = result["members"][member]
        shares = [found[key] for key in ("f_measure", "precision", "recall", "auroc")]
        shares += [found["rejected"][key] for key in ("known", "unknown")]
        shares += [found["top1"][group] for group in ("all", *CLASS_GROUPS)]
        model = f"{stage}, {which}" if stage else which
        rows.append([member, model, *(decimals(share, 100.0, 2) for share in shares)])
    return rows


def _table(rows: list[list[str]]) -> list[str]:
    """Lay out the rows; all numbers in %."""
    spans = [("", 2), ("", 4), ("rejected", 2), ("top-1 with rejection", 4)]
    names = ["in %", "model", "F", "precision", "recall", "AUROC", "known", "unknown", "all", *CLASS_GROUPS]
    return text_table([names, *rows], left=(0, 1), rule=True, spans=spans)


def _draw(saved: SavedRun, which: str, result: Mapping[str, Any], known: State, unknown: State) -> str:
    """Draw how sure the ensemble is of known and of unknown images. Return a line that says where."""
    path = saved.folder / "report" / saved.stage / f"open-{which}-{saved.split}.png"
    found = result["members"]["ensemble"]
    with picture_style():
        figure = new_figure(7.5, 3.9)
        axes = figure.add_subplot()
        _histogram(axes, known["ensemble/confidence"], LAST, f"known ({result['num_known']:,})")
        _histogram(axes, unknown["ensemble/confidence"], _UNKNOWN, f"of no known class ({result['num_unknown']:,})")
        axes.axvline(result["threshold"], color="#777777", linewidth=0.9, linestyle="--", label="threshold")
        axes.set_xlim(0, 1)
        axes.set_xlabel("highest probability of the ensemble")
        axes.set_ylabel("share of the images, %")
        axes.legend(loc="best")
        set_figure_title(
            figure,
            f"{saved.config.method.name}, {saved.config.dataset.name}, run {saved.title}, {which}: images of no known "
            f"class\nF {100 * found['f_measure']:.1f} at {result['threshold']:g}, AUROC {100 * found['auroc']:.1f}",
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_figure(figure, path)
        except OSError as error:
            # A run folder may be read-only for whoever measures it; the table is printed all the same.
            return f"not drawn: {path} cannot be written ({error.strerror})"
    return f"drawn as {path}"


def _histogram(axes: Any, values: NDArray[np.floating], colour: str, label: str) -> None:
    weights = np.full(len(values), 100 / len(values))
    axes.hist(
        values, bins=_BINS, range=(0, 1), weights=weights, histtype="step", color=colour, linewidth=1.5, label=label
    )
