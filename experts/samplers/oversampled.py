"""Random over-sampling: rare classes are repeated until every class is as large as the largest."""

from __future__ import annotations

from typing import Literal

import numpy as np

from experts.data.keyed_random import KeyedRandom, key, permutation
from experts.progress import Progress
from experts.registry import Settings, register
from experts.samplers.draws import cycled_draws, positions_by_class
from experts.samplers.sampler import Sampler


@register("sampler", "oversampled")
class Oversampled(Sampler):
    """Every class max(n) times per epoch, in random order; p_c = 1 / C.

    Exhaustive, other than class-balanced draws: an image of a class of n appears floor(max(n) / n) times or once more,
    so all images of the largest class appear exactly once. An epoch has C max(n) draws: compare runs by steps.
    """

    class Config(Settings):
        name: Literal["oversampled"] = "oversampled"

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)

    @property
    def draws_per_epoch(self) -> int:
        """Draws per epoch: C max(n)."""
        return int(self.counts_C.max()) * len(self.counts_C)

    def class_probabilities(self, progress: Progress) -> np.ndarray:
        """Return the probability of each class at a draw, float64 [C]."""
        del progress
        return np.full(len(self.counts_C), 1 / len(self.counts_C))

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Return the positions of the epoch's images in order, int64 [draws_per_epoch]."""
        del progress
        classes_M = permutation(source_key, self.draws_per_epoch) % len(self.counts_C)  # each class max(n) times
        by_class = [p.tolist() for p in positions_by_class(self.labels, len(self.counts_C))]
        return cycled_draws(classes_M, by_class, KeyedRandom(key(source_key, "cycles")))
