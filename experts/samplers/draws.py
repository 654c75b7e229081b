"""The algorithms that samplers draw with, each a pure function of its source of randomness.

Shapes: C classes, N images, M draws; positions are rows of the training set.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


def positions_by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Positions of each class's images, ascending, C arrays."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])


def class_aware_draws(
    by_class: Sequence[Sequence[int]], images_per_visit: int, num_draws: int, source: random.Random
) -> np.ndarray:
    """Visit the classes in shuffled cycles, taking some images of each class's own shuffled cycle at a visit.

    Within C * images_per_visit aligned draws every class appears exactly images_per_visit times. A cycle is shuffled
    each time it starts, the first time included; a class with fewer images than a visit takes repeats them within it.

    Args:
        by_class: positions of each class.
        source: only `shuffle` is used, on the classes and on a class's images, in the order of need.

    Source: Shen et al. 2016 (class-aware sampling), as in Kang et al. 2020, arXiv:1910.09217.
    """
    images = [list(p) for p in by_class]
    next_image = [len(p) for p in images]  # at the end: the first need shuffles
    classes = list(range(len(images)))
    next_class = len(classes)
    draws: list[int] = []
    while len(draws) < num_draws:
        if next_class == len(classes):
            source.shuffle(classes)
            next_class = 0
        c = classes[next_class]
        next_class += 1
        cycle, at, missing = images[c], next_image[c], images_per_visit
        while missing:
            if at == len(cycle):
                source.shuffle(cycle)
                at = 0
            taken = cycle[at : at + missing]
            draws += taken
            at += len(taken)
            missing -= len(taken)
        next_image[c] = at
    return np.array(draws[:num_draws], dtype=np.int64)


def per_draw_cycle_draws(by_class: Sequence[Sequence[int]], num_draws: int, source: random.Random) -> np.ndarray:
    """For each draw a class uniformly at random, then the next image of its shuffled cycle.

    Every cycle is shuffled once before the first draw, in class order, and again as soon as it is through.

    Source: RIDE's BalancedSampler (Wang et al. 2021, arXiv:2010.01809, second stage).
    """
    images = [list(p) for p in by_class]
    for cycle in images:
        source.shuffle(cycle)
    upcoming = [0] * len(images)
    last = len(images) - 1
    draws = []
    for _ in range(num_draws):
        c = source.randint(0, last)
        cycle, at = images[c], upcoming[c]
        draws.append(cycle[at])
        if at + 1 == len(cycle):
            source.shuffle(cycle)
            at = -1
        upcoming[c] = at + 1
    return np.array(draws, dtype=np.int64)


def cycled_draws(classes_N: np.ndarray, by_class: Sequence[Sequence[int]], source: random.Random) -> np.ndarray:
    """For each given class the next image of its shuffled cycle; a cycle is shuffled each time it starts."""
    draws = np.empty(len(classes_N), dtype=np.int64)
    for rows, positions in zip(positions_by_class(classes_N, len(by_class)), by_class, strict=True):
        cycles: list[int] = []
        cycle = list(positions)
        while len(cycles) < len(rows):
            source.shuffle(cycle)
            cycles += cycle
        draws[rows] = cycles[: len(rows)]
    return draws


def weighted_draws(weights_N: np.ndarray, uniforms_M: np.ndarray) -> np.ndarray:
    """Draw with replacement, in proportion to weights, one uniform a draw: the first index whose cumulated share
    reaches it. Gives torch.multinomial's draws from torch's uniforms.

    Args:
        weights_N: float64, none negative, not all zero.
        uniforms_M: float64 in [0, 1).

    Returns:
        Indices, int64 [M], in [0, N).
    """
    cumulated = np.cumsum(weights_N)
    return np.searchsorted(cumulated[:-1] / cumulated[-1], uniforms_M, side="left")
