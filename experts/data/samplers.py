"""Which images an epoch consists of: samplers by name, and the cycle algorithms they are built from.

A sampler's epoch is a pure function of (progress, source_key). The published cyclic samplers keep their cycles from
epoch to epoch; ours begin each epoch with fresh ones, which differs by one partial cycle per class and epoch and needs
no state to resume. Shapes: C classes, N images; positions are rows of the training set.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.data.random import KeyedRandom, key, permutation, uniforms
from experts.progress import Progress
from experts.registry import Settings, register


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


def effective_number_weights(counts_C: np.ndarray, beta: float) -> np.ndarray:
    """Per-image weight (1 - beta) / (1 - beta^n_c), float64 [C].

    Source: Cui et al. 2019, arXiv:1901.05555, Eq. 4.
    """
    return (1 - beta) / (1 - beta ** counts_C.astype(np.float64))


class _Sampler:
    """What all samplers share: the training labels."""

    def __init__(self, labels: np.ndarray, num_classes: int) -> None:
        self.labels = labels
        self.counts_C = np.bincount(labels, minlength=num_classes)
        if not len(labels) or not self.counts_C.all():
            raise ValueError(
                f"a sampler needs at least 1 image of every class, found "
                f"{self.counts_C.tolist() if num_classes <= 20 else self.counts_C.min()}"
            )

    @property
    def draws_per_epoch(self) -> int:
        """Images in an epoch; N unless the sampler says otherwise."""
        return len(self.labels)


class _WeightedSampler(_Sampler):
    """Draws images with replacement, an image's weight depending on its class alone."""

    weights_C: np.ndarray

    def class_probabilities(self, progress: Progress) -> np.ndarray:
        """Probability that a draw is of a class, float64 [C]."""
        del progress
        mass_C = self.counts_C * self.weights_C
        return mass_C / mass_C.sum()

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Positions of the epoch's images in order, int64 [draws_per_epoch]."""
        del progress
        return weighted_draws(self.weights_C[self.labels], uniforms(source_key, 0, self.draws_per_epoch, 1)[:, 0])


@register("sampler", "instance_balanced")
class InstanceBalanced(_Sampler):
    """Every image exactly once an epoch, in random order; p_c = n_c / N."""

    class Config(Settings):
        name: Literal["instance_balanced"] = "instance_balanced"

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)

    def class_probabilities(self, progress: Progress) -> np.ndarray:
        """Probability that a draw is of a class, float64 [C]."""
        del progress
        return self.counts_C / self.counts_C.sum()

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Positions of the epoch's images in order, int64 [N]."""
        del progress
        return permutation(source_key, len(self.labels))


@register("sampler", "class_balanced")
class ClassBalanced(_WeightedSampler):
    """Every class equally often; p_c = 1 / C."""

    class Config(Settings):
        name: Literal["class_balanced"] = "class_balanced"
        form: Literal["class_aware", "per_draw_cycle", "multinomial"] = "class_aware"
        """class_aware: cycles over classes and images (cRT, LWS, MiSLAS); per_draw_cycle: a random class, then its
        image cycle (RIDE stage 2); multinomial: images with replacement, weight 1 / n (GCL, CMO)."""
        images_per_visit: Annotated[int, Field(ge=1)] = 4
        """class_aware: consecutive images of a class."""
        epoch: Literal["images", "largest_class"] = "images"
        """Draws in an epoch: N, or max(n) * C as class_aware loaders are nominally long; published runs
        of those stop after N / batch_size batches."""

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        self.config = config
        self.weights_C = 1.0 / self.counts_C

    @property
    def draws_per_epoch(self) -> int:
        """N, or max(n) * C."""
        if self.config.epoch == "largest_class":
            return int(self.counts_C.max()) * len(self.counts_C)
        return len(self.labels)

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Positions of the epoch's images in order, int64 [draws_per_epoch]."""
        if self.config.form == "multinomial":
            return super().draw(progress, source_key)
        by_class = [p.tolist() for p in positions_by_class(self.labels, len(self.counts_C))]
        source = KeyedRandom(source_key)
        if self.config.form == "per_draw_cycle":
            return per_draw_cycle_draws(by_class, self.draws_per_epoch, source)
        return class_aware_draws(by_class, self.config.images_per_visit, self.draws_per_epoch, source)


@register("sampler", "square_root")
class SquareRoot(_WeightedSampler):
    """Images with replacement, weight n^-1/2; p_c = sqrt(n_c) / sum sqrt(n)."""

    class Config(Settings):
        name: Literal["square_root"] = "square_root"

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        self.weights_C = self.counts_C**-0.5


@register("sampler", "progressively_balanced")
class ProgressivelyBalanced(_Sampler):
    """From instance-balanced in the first epoch to class-balanced in the last; classes with replacement, images in
    cycles.

    p_c = (1 - l) n_c / N + l / C, l = (t - 1) / (T - 1) for epoch t of T.

    Source: Kang et al. 2020, arXiv:1910.09217. Differs: the paper writes l = t / T; this is the published code's.
    T is the stage's own number of epochs, where the published sampler has a second setting that can disagree.
    """

    class Config(Settings):
        name: Literal["progressively_balanced"] = "progressively_balanced"

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)

    def class_probabilities(self, progress: Progress) -> np.ndarray:
        """Probability that a draw is of a class, float64 [C]."""
        share = (progress.epoch - 1) / max(progress.epochs - 1, 1)
        return (1 - share) * self.counts_C / self.counts_C.sum() + share / len(self.counts_C)

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Positions of the epoch's images in order, int64 [N]."""
        # The class draws and the cycles use different keys: one stream read twice would tie images to classes.
        uniforms_N = uniforms(source_key, 0, len(self.labels), 1)[:, 0]
        classes_N = weighted_draws(self.class_probabilities(progress), uniforms_N)
        by_class = [p.tolist() for p in positions_by_class(self.labels, len(self.counts_C))]
        return cycled_draws(classes_N, by_class, KeyedRandom(key(source_key, "cycles")))


@register("sampler", "reversed")
class Reversed(_WeightedSampler):
    """Tail classes as often as head classes occur; p_c = (1 / n_c) / sum (1 / n), images with replacement.

    Source: Zhou et al. 2020 (BBN), arXiv:1912.02413.
    """

    class Config(Settings):
        name: Literal["reversed"] = "reversed"

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        self.weights_C = self.counts_C**-2.0


@register("sampler", "effective_number")
class EffectiveNumber(_WeightedSampler):
    """Images with replacement, weight (1 - beta) / (1 - beta^n); nearly class-balanced while n << 1 / (1 - beta)."""

    class Config(Settings):
        name: Literal["effective_number"] = "effective_number"
        beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
        """No unit; published 0.9999."""

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        self.weights_C = effective_number_weights(self.counts_C, config.beta)
