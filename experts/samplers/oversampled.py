"""Random over-sampling: rare classes are repeated until every class is as large as the largest."""

from __future__ import annotations

from typing import Literal

import numpy as np

from experts.data.keyed_random import key, permutation
from experts.progress import Progress
from experts.registry import Settings, register
from experts.samplers.draws import positions_by_class
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
        # In a random order, so that other images of a class are the ones that appear once more.
        order_N = permutation(key(source_key, "choice"), len(self.labels))
        by_class = positions_by_class(self.labels[order_N], len(self.counts_C))
        repeated_M = np.concatenate([np.resize(order_N[rows], self.counts_C.max()) for rows in by_class])
        return repeated_M[permutation(key(source_key, "order"), len(repeated_M))]
