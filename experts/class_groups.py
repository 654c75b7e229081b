"""Groups of classes from head to tail, as methods cut them: many, medium and few.

They decide which classes an expert learns (ACE, ResLT) or which images it trains on (LFME). Tables of results follow a
fixed rule of their own (`aggregation/metrics.py`).

Shapes: C classes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from experts.registry import Settings


class GroupRule(Settings):
    """How classes are cut into groups, after sorting them by falling count and, at equal counts, by class id."""

    rule: Literal["count", "equal", "index"] = "count"
    """count: by training images, into three groups, or into two (many and the rest); equal: into groups of equal size,
    of which the first may have one class more; index: at `cuts`."""
    many_above: Annotated[int, Field(ge=0)] = 100
    """count: a class with more training images is many; published 100, LFME 99 (100 is many)."""
    few_below: Annotated[int, Field(ge=0)] = 20
    """count: a class with fewer training images is few; published 20, LFME 21 (20 is few)."""
    cuts: tuple[int, ...] | None = None
    """index: places in the sorted list where a new group begins, one less than there are groups; published for ResLT
    35, 70 (CIFAR-100), 2, 4 (CIFAR-10), 175, 780 (ImageNet-LT), 1542 (iNaturalist 2018, two branches)."""

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.model_dump().items() if value is not None)


def split_classes(counts_C: Tensor | np.ndarray, num_groups: int, rule: GroupRule) -> list[np.ndarray]:
    """Cut the classes into groups from head to tail.

    Args:
        counts_C: training images per class.
        num_groups: at least 2.
        rule: how; error messages call it `groups`, the key it has in a method's config.

    Returns:
        Class ids, one int64 array per group, by falling count inside and across groups; every class is in one group.

    Raises:
        ValueError: a rule that cannot give that many groups, cuts that do not fit, or a group without a class.
    """
    counts = np.asarray(counts_C)
    order_C = np.argsort(
        -counts, kind="stable"
    )  # an unstable sort would order ties differently from machine to machine
    if rule.rule == "equal":
        groups = np.array_split(order_C, num_groups)
    elif rule.rule == "index":
        groups = np.split(order_C, _checked_cuts(rule.cuts, num_groups, len(counts)))
    else:
        groups = _by_count(counts, order_C, num_groups, rule)
    for place, group in enumerate(groups):
        if not len(group):
            raise ValueError(_empty_group(place, counts, num_groups, rule))
    return [group.astype(np.int64) for group in groups]


def nested_targets(counts_C: Tensor, num_groups: int, rule: GroupRule) -> Tensor:
    """Return the classes that each expert learns: all, all but the first group, ..., the last group alone.

    Returns:
        Bool [num_groups, C], on the counts' device.

    Raises:
        ValueError: see `split_classes`.
    """
    targets = torch.zeros(num_groups, len(counts_C), dtype=torch.bool)
    for place, group in enumerate(split_classes(counts_C.cpu(), num_groups, rule)):
        targets[: place + 1, torch.from_numpy(group)] = True
    return targets.to(counts_C.device)


def _by_count(counts_C: np.ndarray, order_C: np.ndarray, num_groups: int, rule: GroupRule) -> list[np.ndarray]:
    if num_groups not in (2, 3):
        raise ValueError(
            f"groups.rule = 'count' gives 3 groups (many, medium, few) or 2 (many and the rest), needed {num_groups}; "
            f"set groups.rule = 'equal', or 'index' with {num_groups - 1} groups.cuts"
        )
    if rule.few_below > rule.many_above + 1:
        raise ValueError(
            f"groups.few_below = {rule.few_below} and groups.many_above = {rule.many_above}: a class between the two "
            f"would be many and few; few_below must be at most many_above + 1"
        )
    sorted_C = counts_C[order_C]  # falling, so the number of classes above a bound is the place where they end
    first_medium = int((sorted_C > rule.many_above).sum())
    first_few = int((sorted_C >= rule.few_below).sum())
    return np.split(order_C, [first_medium, first_few] if num_groups == 3 else [first_medium])


def _checked_cuts(cuts: tuple[int, ...] | None, num_groups: int, num_classes: int) -> list[int]:
    edges = [0, *(cuts or ()), num_classes]
    if len(edges) != num_groups + 1 or any(a >= b for a, b in pairwise(edges)):
        found = "none" if cuts is None else ", ".join(map(str, cuts))
        raise ValueError(
            f"groups.cuts = {found}: groups.rule = 'index' needs {num_groups - 1} rising numbers between 1 and "
            f"{num_classes - 1} for {num_groups} groups of {num_classes} classes; or set groups.rule = 'equal'"
        )
    return edges[1:-1]


def _empty_group(place: int, counts_C: np.ndarray, num_groups: int, rule: GroupRule) -> str:
    if rule.rule == "equal":
        return f"groups.rule = 'equal': {len(counts_C)} classes do not fill {num_groups} groups; use fewer experts"
    many = f"many (more than groups.many_above = {rule.many_above} images)"
    few = f"few (fewer than groups.few_below = {rule.few_below} images)"
    medium = f"medium ({rule.few_below} to {rule.many_above} images)"
    rest = f"without being many (at most groups.many_above = {rule.many_above} images)"
    name = ([many, medium, few] if num_groups == 3 else [many, rest])[place]
    return (
        f"groups.rule = 'count': no class is {name}; found {counts_C.min()} to {counts_C.max()} training images in "
        f"{len(counts_C)} classes; set groups.rule = 'equal', or move groups.many_above and groups.few_below"
    )
