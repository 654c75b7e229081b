"""Relative accuracy: what a method reaches on long-tailed data, as a share of what balanced data of that size gives.

A_t is the accuracy on the long-tailed set. A_v is that of plain cross-entropy trained on the balanced variant of the
set (same classes and total, equal counts), A_b that of the method itself trained there. A_u = max(A_v, A_b) is the
upper reference, A_r = A_t / A_u the relative accuracy.

Source: Zhang et al. 2023, "Deep Long-Tailed Learning: A Survey", section 4 and Figure 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from configs import VANILLA
from orchestration.reports.records import Record
from orchestration.reports.rows import Row, Table, base_name, recipe_keys, schedule_of
from orchestration.reports.statistics import mean_and_sd

Spread = tuple[float | None, float | None]


@dataclass(frozen=True)
class Relative:
    """Relative accuracy of a row; every number is a mean over seeds and its standard deviation, fractions.

    Attributes:
        vanilla: A_v.
        own: A_b; (None, None) where the recipe was not trained on the balanced set.
        upper: A_u, the larger of the two means.
        relative: A_r. Its spread is that of the ratios paired by seed, or follows from both spreads to first order.
    """

    vanilla: Spread
    own: Spread
    upper: Spread
    relative: Spread


def relative_accuracies(table: Table, references: Sequence[Record], which: str = "last") -> dict[str, Relative]:
    """Return the relative accuracy of every row that has a reference, by label.

    Args:
        table: rows that were trained on long-tailed data.
        references: results of runs on the balanced variant of their data.
        which: "last" or "best".
    """
    fitting = [one for one in references if _is_balanced_variant(one, table)]
    vanilla = _by_seed([one for one in fitting if base_name(one) == VANILLA], which)
    found = {}
    for row in table.rows:
        keys = recipe_keys(row.records[0])
        own = _by_seed([one for one in fitting if recipe_keys(one) == keys], which)
        if vanilla or own:
            found[row.label] = _relative(row, vanilla, own, which)
    return found


def _is_balanced_variant(reference: Record, table: Table) -> bool:
    """Tell whether a run saw the balanced variant of a table's data, under its schedule."""
    counts = reference.data.counts
    same_classes = reference.data.class_names == table.data.class_names
    spread = max(counts) - min(counts) <= 1
    near = abs(sum(counts) - sum(table.data.counts)) <= len(counts)  # the total is rounded per class
    return same_classes and spread and near and schedule_of(reference) == table.schedule


def _by_seed(records: Sequence[Record], which: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for record in records:
        value = (record.models.get(which) or record.models["last"]).values["all"]
        if value is not None:
            found.setdefault(record.seed, value)
    return found


def _relative(row: Row, vanilla: Mapping[int, float], own: Mapping[int, float], which: str) -> Relative:
    a_v, a_b = mean_and_sd(list(vanilla.values())), mean_and_sd(list(own.values()))
    upper = own if (a_b[0] or 0.0) > (a_v[0] or 0.0) else vanilla
    a_t = row.values("all", which)
    return Relative(a_v, a_b, mean_and_sd(list(upper.values())), _ratio(a_t, upper))


def _ratio(ours: Mapping[int, float], upper: Mapping[int, float]) -> Spread:
    """Return the ratio of two accuracies and its standard deviation."""
    (a_t, sd_t), (a_u, sd_u) = mean_and_sd(list(ours.values())), mean_and_sd(list(upper.values()))
    if a_t is None or not a_u:
        return None, None
    ratio = a_t / a_u
    if set(ours) == set(upper) and len(ours) > 1 and all(upper.values()):
        return ratio, float(np.std([ours[seed] / upper[seed] for seed in ours], ddof=1))
    if sd_t is None or sd_u is None or not a_t:
        return ratio, None
    return ratio, ratio * math.hypot(sd_t / a_t, sd_u / a_u)
