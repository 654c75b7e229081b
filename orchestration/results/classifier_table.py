"""Losses by classifiers: several runs with the same final stages as one table, laid out as the survey's Table 7.

A row per loss, and for each classifier (final stage) the accuracy of many-, medium- and few-shot classes and of all
images. Source of the layout: Zhang et al. 2023, "Deep Long-Tailed Learning: A Survey", Table 7, which calls the groups
head, middle and tail.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orchestration.results.tables import CLASS_GROUPS
from orchestration.results.text import decimals, text_table

RULES = {"number of training images": "", "index": "_by_index"}
"""A rule for grouping classes, in words, and the suffix of its keys in an evaluation."""


class Entry(NamedTuple):
    """One run with several final stages.

    Attributes:
        loss: label of its row; runs with the same label are seeds of one row.
        seed: of the run.
        top1: accuracy of the ensemble by final stage, then by group, as in an evaluation.
    """

    loss: str
    seed: int
    top1: Mapping[str, Mapping[str, float | None]]


def loss_label(method: str, finals: Sequence[str]) -> str:
    """Return a method's name without the final stages that composing has appended: `ldam+ncm+crt` -> `ldam`."""
    words = [word for word in method.split("+") if word not in finals]
    return "+".join(words) or method


def entry(method: str, seed: int, finals: Mapping[str, Mapping[str, Mapping[str, Any]]], which: str = "last") -> Entry:
    """Return the entry of a saved run.

    Args:
        method: name of the recipe.
        seed: of the run.
        finals: as `final_evaluations` reads them.
        which: "last" or "best", the models to show.
    """
    shown = {stage: evaluations[which] for stage, evaluations in finals.items() if which in evaluations}
    top1 = {stage: evaluation["members"]["ensemble"]["top1"] for stage, evaluation in shown.items()}
    return Entry(loss_label(method, list(finals)), seed, top1)


def classifier_table(entries: Sequence[Entry], sizes: Mapping[str, int] | None = None) -> list[str]:
    """Return the table under each rule that groups the classes.

    Where a row has several seeds it shows their mean, and below it their standard deviation.

    Args:
        entries: the runs; rows and columns come in the order of their first appearance.
        sizes: number of classes by group, shown above the table.

    Returns:
        Lines of text; empty without entries.
    """
    losses = dict.fromkeys(one.loss for one in entries)
    classifiers = list(dict.fromkeys(stage for one in entries for stage in one.top1))
    lines: list[str] = []
    for rule, suffix in RULES.items():
        groups = [group + suffix for group in CLASS_GROUPS]
        if not any(top1.get(key) is not None for one in entries for top1 in one.top1.values() for key in groups):
            continue
        keys = [*groups, "all"]
        rows = [["", *([*CLASS_GROUPS, "all"] * len(classifiers))]]
        for loss in losses:
            of_loss = [one for one in entries if one.loss == loss]
            cells = [_values(of_loss, stage, key) for stage in classifiers for key in keys]
            rows.append([loss, *(decimals(_mean(values), 100.0, 1) for values in cells)])
            if len(of_loss) > 1:
                spread = [f"±{decimals(_deviation(values), 100.0, 1)}" for values in cells]
                rows.append([f"  {len(of_loss)} seeds", *spread])
        counts = ", ".join(f"{key.removesuffix(suffix)} {sizes[key]}" for key in groups if sizes and key in sizes)
        lines += ["", f"Top-1 accuracy in %, classes grouped by {rule}{f' ({counts} classes)' if counts else ''}"]
        lines += text_table(rows, rule=True, spans=[("", 1), *((stage, len(keys)) for stage in classifiers)])
    if any(len([one for one in entries if one.loss == loss]) > 1 for loss in losses):
        lines.append("mean over seeds; ±: standard deviation over seeds")
    return lines[1:]


def _values(entries: Sequence[Entry], stage: str, key: str) -> list[float]:
    found = [(one.top1.get(stage) or {}).get(key) for one in entries]
    return [value for value in found if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
