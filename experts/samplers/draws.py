"""The algorithms that samplers draw with, each a pure function of the random generator that it is given.

Shapes: C classes, N images, M draws; positions are rows of the training set.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


def positions_by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return the positions of each class's images, ascending, C arrays."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])


def class_aware_draws(
    by_class: Sequence[Sequence[int]], images_per_visit: int, num_draws: int, generator: random.Random
) -> np.ndarray:
    """Visit the classes in shuffled cycles; each visit takes some images of the class's own shuffled cycle.

    Within C * images_per_visit aligned draws every class appears exactly images_per_visit times. A cycle is shuffled
    each time it starts, including the first. A class with fewer images than images_per_visit repeats them in a visit.

    Args:
        by_class: positions of each class.
        generator: only its `shuffle` is used, on the classes and on the images of a class, when a cycle starts.

    Source: Shen et al. 2016 (class-aware sampling), as in Kang et al. 2020, arXiv:1910.09217.
    """
    images = [list(p) for p in by_class]
    next_image = [len(p) for p in images]  # every cycle is at its end, so that the first visit shuffles it
    classes = list(range(len(images)))
    next_class = len(classes)
    draws: list[int] = []
    while len(draws) < num_draws:
        if next_class == len(classes):
            generator.shuffle(classes)
            next_class = 0
        c = classes[next_class]
        next_class += 1
        cycle, at, missing = images[c], next_image[c], images_per_visit
        while missing:
            if at == len(cycle):
                generator.shuffle(cycle)
                at = 0
            taken = cycle[at : at + missing]
            draws += taken
            at += len(taken)
            missing -= len(taken)
        next_image[c] = at
    return np.array(draws[:num_draws], dtype=np.int64)


def per_draw_cycle_draws(by_class: Sequence[Sequence[int]], num_draws: int, generator: random.Random) -> np.ndarray:
    """Draw a class uniformly at random, then the next image of its shuffled cycle, num_draws times.

    Every cycle is shuffled once before the first draw, in class order, and again as soon as it has ended.

    Source: RIDE's BalancedSampler (Wang et al. 2021, arXiv:2010.01809, second stage).
    """
    images = [list(p) for p in by_class]
    for cycle in images:
        generator.shuffle(cycle)
    upcoming = [0] * len(images)
    last = len(images) - 1
    draws = []
    for _ in range(num_draws):
        c = generator.randint(0, last)
        cycle, at = images[c], upcoming[c]
        draws.append(cycle[at])
        if at + 1 == len(cycle):
            # Now, not at the next visit: another order of calls to the generator gives other draws than published.
            generator.shuffle(cycle)
            at = -1
        upcoming[c] = at + 1
    return np.array(draws, dtype=np.int64)


def cycled_draws(classes_N: np.ndarray, by_class: Sequence[Sequence[int]], generator: random.Random) -> np.ndarray:
    """Return the next image of the cycle of each given class; a cycle is shuffled whenever it starts."""
    draws = np.empty(len(classes_N), dtype=np.int64)
    for rows, positions in zip(positions_by_class(classes_N, len(by_class)), by_class, strict=True):
        cycles: list[int] = []
        cycle = list(positions)
        while len(cycles) < len(rows):
            generator.shuffle(cycle)
            cycles += cycle
        draws[rows] = cycles[: len(rows)]
    return draws


def first_of_each_class(labels: np.ndarray, num_classes: int, per_class: int, order_N: np.ndarray) -> np.ndarray:
    """Return the first images of each class in a given order, at most `per_class` of each, class by class.

    Args:
        order_N: all positions; a random order makes it a random choice.
    """
    return np.concatenate([order_N[rows[:per_class]] for rows in positions_by_class(labels[order_N], num_classes)])


def weighted_draws(weights_N: np.ndarray, uniforms_M: np.ndarray) -> np.ndarray:
    """Draw with replacement, in proportion to weights, from one uniform number per draw.

    A draw is the first index whose cumulative share reaches the number. From torch's uniforms this gives the draws of
    torch.multinomial.

    Args:
        weights_N: float64, none negative, not all zero.
        uniforms_M: float64 in [0, 1).

    Returns:
        Indices, int64 [M], in [0, N).
    """
    cumulative = np.cumsum(weights_N)
    # The last share is 1, above every number: whatever passes the others falls to the last index.
    return np.searchsorted(cumulative[:-1] / cumulative[-1], uniforms_M, side="left")
