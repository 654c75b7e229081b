"""Sampling that goes from instance-balanced to class-balanced over the epochs."""

from __future__ import annotations

from typing import Literal

import numpy as np

from experts.data.keyed_random import KeyedRandom, key, uniforms
from experts.progress import Progress
from experts.registry import Settings, register
from experts.samplers.draws import cycled_draws, positions_by_class, weighted_draws
from experts.samplers.sampler import Sampler


@register("sampler", "progressively_balanced")
class ProgressivelyBalanced(Sampler):
    """Instance-balanced in the first epoch, class-balanced in the last; classes with replacement, images in cycles.

    p_c = (1 - l) n_c / N + l / C, l = (t - 1) / (T - 1) for epoch t of T.

    Source: Kang et al. 2020, arXiv:1910.09217. Differs: the paper writes l = t / T; this is the published code's.
    T is the number of epochs of the stage; the published sampler has a setting of its own for it, which can disagree.
    """

    class Config(Settings):
        name: Literal["progressively_balanced"] = "progressively_balanced"

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)

    def class_probabilities(self, progress: Progress) -> np.ndarray:
        """Return the probability of each class at a draw, float64 [C]."""
        share = (progress.epoch - 1) / max(progress.epochs - 1, 1)
        return (1 - share) * self.counts_C / self.counts_C.sum() + share / len(self.counts_C)

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Return the positions of the epoch's images in order, int64 [N]."""
        # Class draws and cycles have different keys: if both read one stream, the images would depend on the classes.
        uniforms_N = uniforms(source_key, 0, len(self.labels), 1)[:, 0]
        classes_N = weighted_draws(self.class_probabilities(progress), uniforms_N)
        by_class = [p.tolist() for p in positions_by_class(self.labels, len(self.counts_C))]
        return cycled_draws(classes_N, by_class, KeyedRandom(key(source_key, "cycles")))
