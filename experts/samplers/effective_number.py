"""Sampling by the effective number of images of each class."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.registry import Settings, register
from experts.samplers.sampler import WeightedSampler


def effective_number_weights(counts_C: np.ndarray, beta: float) -> np.ndarray:
    """Return the weight of an image of each class, (1 - beta) / (1 - beta^n_c), float64 [C].

    The class weights of losses (`experts/losses/effective_number.py`) have the same ratios, scaled to the sum C.

    Source: Cui et al. 2019, arXiv:1901.05555, Eq. 4.
    """
    return (1 - beta) / (1 - beta ** counts_C.astype(np.float64))


@register("sampler", "effective_number")
class EffectiveNumber(WeightedSampler):
    """Images with replacement, weight (1 - beta) / (1 - beta^n); nearly class-balanced while n << 1 / (1 - beta)."""

    class Config(Settings):
        name: Literal["effective_number"] = "effective_number"
        beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
        """No unit; published 0.9999."""

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        self.weights_C = effective_number_weights(self.counts_C, config.beta)
