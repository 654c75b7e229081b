"""Sampling with reversed class frequencies."""

from __future__ import annotations

from typing import Literal

import numpy as np

from experts.registry import Settings, register
from experts.samplers.sampler import WeightedSampler


@register("sampler", "reversed")
class Reversed(WeightedSampler):
    """Rare classes as often as frequent ones occur in the data; p_c = (1 / n_c) / sum (1 / n), images with replacement.

    Source: Zhou et al. 2020 (BBN), arXiv:1912.02413.
    """

    class Config(Settings):
        name: Literal["reversed"] = "reversed"

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        # n images of weight n^-2 give a class the mass 1 / n.
        self.weights_C = self.counts_C**-2.0
