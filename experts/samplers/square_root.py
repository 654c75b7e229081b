"""Sampling in which a class appears in proportion to the square root of its size."""

from __future__ import annotations

from typing import Literal

import numpy as np

from experts.registry import Settings, register
from experts.samplers.sampler import WeightedSampler


@register("sampler", "square_root")
class SquareRoot(WeightedSampler):
    """Images with replacement, weight n^-1/2; p_c = sqrt(n_c) / sum sqrt(n)."""

    class Config(Settings):
        name: Literal["square_root"] = "square_root"

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        # n images of weight n^-1/2 give a class the mass sqrt(n).
        self.weights_C = self.counts_C**-0.5
