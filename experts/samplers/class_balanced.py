"""Sampling in which every class appears equally often."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.data.keyed_random import KeyedRandom
from experts.progress import Progress
from experts.registry import Settings, register
from experts.samplers.draws import class_aware_draws, per_draw_cycle_draws, positions_by_class
from experts.samplers.sampler import WeightedSampler


@register("sampler", "class_balanced")
class ClassBalanced(WeightedSampler):
    """Every class equally often; p_c = 1 / C."""

    class Config(Settings):
        name: Literal["class_balanced"] = "class_balanced"
        form: Literal["class_aware", "per_draw_cycle", "multinomial"] = "class_aware"
        """class_aware: cycles over classes and images (cRT, LWS, MiSLAS); per_draw_cycle: a random class, then its
        image cycle (RIDE stage 2); multinomial: images with replacement, weight 1 / n (GCL, CMO), which is a random
        class, then a random image of it (DR+MU)."""
        images_per_visit: Annotated[int, Field(ge=1)] = 4
        """class_aware: images drawn from a class before the next class."""
        epoch: Literal["images", "largest_class"] = "images"
        """Draws per epoch: images: N; largest_class: max(n) * C, the nominal length of published class_aware loaders,
        whose runs nevertheless stop after N / batch_size batches."""

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        self.config = config
        # n images of weight 1 / n give every class the mass 1.
        self.weights_C = 1.0 / self.counts_C

    @property
    def draws_per_epoch(self) -> int:
        """Draws per epoch: N, or max(n) * C."""
        if self.config.epoch == "largest_class":
            return int(self.counts_C.max()) * len(self.counts_C)
        return len(self.labels)

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Return the positions of the epoch's images in order, int64 [draws_per_epoch]."""
        if self.config.form == "multinomial":
            return super().draw(progress, source_key)
        by_class = [p.tolist() for p in positions_by_class(self.labels, len(self.counts_C))]
        generator = KeyedRandom(source_key)
        if self.config.form == "per_draw_cycle":
            return per_draw_cycle_draws(by_class, self.draws_per_epoch, generator)
        return class_aware_draws(by_class, self.config.images_per_visit, self.draws_per_epoch, generator)
