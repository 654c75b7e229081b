"""Folders of finished runs that never ran: configs are composed, what was measured is made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.metrics import all_groups
from aggregation.predictions import Predictions
from orchestration.config.compose import compose, to_yaml
from orchestration.config.identity import config_hash, deciding_keys
from orchestration.config.run_config import RunConfig
from orchestration.storage.files import CONFIG, DATA, RUN, write_json
from orchestration.storage.predictions import write_predictions

WORDS = ("dataset=digits_lt", "pace=digits_lt", "tracking.enabled=false")
COUNTS = (150, 120, 110, 80, 60, 40, 25, 15, 8, 4)
"""Training images of ten classes: three many-, four medium- and three few-shot ones."""
_IMAGES = 20  # of each class, of the test


def finish(
    folder: Path,
    *words: str,
    accuracy: Mapping[str, Sequence[float]] | Sequence[float],
    counts: Sequence[int] = COUNTS,
    best: Sequence[float] | None = None,
    digest: str = "d1" * 32,
    predictions: bool = True,
    images: int = _IMAGES,
    base: Sequence[str] = WORDS,
) -> Path:
    """Write a finished run.

    Args:
        folder: of the run.
        words: of its config, with those of `base` in front.
        accuracy: of each class, or several by final stage; rounded to whole images.
        counts: training images per class.
        best: accuracy of the best model, chosen on test; None for that of the last.
        digest: of the data.
        predictions: whether they are kept.
        images: of each class in the test.
        base: data set and schedule.
    """
    config = compose([*base, f"run.dir={folder.parent}", f"run.name={folder.name}", *words]).config
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(to_yaml(config))
    write_json(folder / RUN, _facts(config))
    write_json(folder / DATA, _data(counts, digest))
    several = accuracy if isinstance(accuracy, Mapping) else {"": accuracy}
    for stage, own in several.items():
        for place in dict.fromkeys((stage, "")):
            _evaluate(folder / "evaluation" / place, config, own, own if best is None else best, counts, images,
                      kept=predictions)  # fmt: skip
    return folder


def _facts(config: RunConfig) -> dict[str, Any]:
    return {
        "status": "finished", "commit": "c0ffee", "config_hash": config_hash(config), "seed": config.seed,
        "parameters": deciding_keys(config), "size": {"parameters": 80_000, "multiply_adds": 4_000_000},
        "versions": {"torch": "2"}, "host": {"processor": "P", "cpus": 2}, "mesh": {"slots": 1, "replicas": 1},
        "cost": {"worker_hours": 0.5, "cpu_hours": 0.5, "gpu_hours": 0.0},
    }  # fmt: skip


def _data(counts: Sequence[int], digest: str) -> dict[str, Any]:
    groups = {name: ids.tolist() for name, ids in all_groups(counts, None).items() if ids is not None}
    by_count = {name: groups[name] for name in ("many", "medium", "few")}
    names = [f"c{i}" for i in range(len(counts))]
    return {"dataset": "digits_lt", "class_names": names, "counts": list(counts), "digest": digest,
            "groups": {"by_count": by_count, "by_index": None}}  # fmt: skip


def _evaluate(
    folder: Path, config: RunConfig, last: Sequence[float], best: Sequence[float], counts: Sequence[int], images: int,
    *, kept: bool,
) -> None:  # fmt: skip
    labels = np.repeat(np.arange(len(counts)), images)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for which, accuracy in (("last", last), ("best", best)):
        right = (np.arange(len(labels)) % images) < np.rint(np.asarray(accuracy) * images)[labels]
        found[which] = _predictions(labels, right, len(counts))
        per_class = [float(right[labels == c].mean()) for c in range(len(counts))]
        write_json(folder / f"{which}.json", _evaluation(config, which, per_class, counts, len(labels)))
    if kept:
        splits = (([which], "test", one) for which, one in found.items())
        write_predictions([folder], splits, len(counts), probabilities=True)


def _predictions(labels: np.ndarray, right: np.ndarray, classes: int) -> Predictions:
    """The wrong ones are taken for the next class."""
    said = np.where(right, labels, (labels + 1) % classes).astype(np.int32)
    sure = np.full((1, len(labels)), 0.9, dtype=np.float32)
    return Predictions(("ensemble",), labels, said[None], np.where(right, 0, 1).astype(np.int32)[None], sure, None)


def _evaluation(
    config: RunConfig, which: str, per_class: list[float], counts: Sequence[int], images: int
) -> dict[str, Any]:
    groups = all_groups(counts, None)
    top1: dict[str, float | None] = {"all": float(np.mean(per_class))}
    for name, ids in groups.items():
        if name != "all":
            top1[name] = float(np.mean([per_class[i] for i in ids])) if ids is not None and len(ids) else None
    ensemble = {"top1": top1, "nll": 1.5, "ece": 0.1, "mce": 0.2, "per_class": per_class}
    stage = config.method.final
    return {
        "split": "test", "selected_on": "test" if which == "best" else None, "selected_value": top1["all"],
        "stage": stage,
        "epoch": config.method.stages[stage].epochs, "step": 9 if which == "last" else 5, "num_images": images,
        "members": {"ensemble": ensemble}, "per_image": {},
    }  # fmt: skip
