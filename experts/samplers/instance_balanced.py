"""Sampling in which every image appears exactly once per epoch."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from experts.data.keyed_random import permutation
from experts.progress import Progress
from experts.registry import Settings, register
from experts.samplers.sampler import Sampler


@register("sampler", "instance_balanced")
class InstanceBalanced(Sampler):
    """Every image exactly once per epoch, in random order; p_c = n_c / N."""

    class Config(Settings):
        name: Literal["instance_balanced"] = "instance_balanced"

    keeps_distribution: ClassVar[bool] = True

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)

    def class_probabilities(self, progress: Progress) -> np.ndarray:
        """Return the probability of each class at a draw, float64 [C]."""
        del progress
        return self.counts_C / self.counts_C.sum()

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Return the positions of the epoch's images in order, int64 [N]."""
        del progress
        return permutation(source_key, len(self.labels))
