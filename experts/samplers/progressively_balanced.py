"""From instance-balanced to class-balanced over the epochs."""

from __future__ import annotations

from typing import Literal

import numpy as np

from experts.data.keyed_random import KeyedRandom, key, uniforms
from experts.progress import Progress
from experts.registry import Settings, register
from experts.samplers.draws import (
    cycled_draws,
    positions_by_class,
    weighted_draws,
)
from experts.samplers.sampler import Sampler


@register("sampler", "progressively_balanced")
class ProgressivelyBalanced(Sampler):
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
