"""A fixed subset of the training images with at most so many of each class."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.cases import Case
from experts.data.keyed_random import key, permutation
from experts.registry import Settings, register
from experts.samplers.draws import first_of_each_class
from experts.samplers.sampler import PartSampler


@register("sampler", "capped")
class Capped(PartSampler):
    """At most `cap` images of each class, each once per epoch; the same images in every epoch, stage and run.

    The images are chosen at random, but like a published list they depend on the training set and `seed` alone.

    Source: Cui et al. 2018 (DSTL), arXiv:1806.06193: fine-tuning on a more balanced subset.
    """

    class Config(Settings):
        name: Literal["capped"] = "capped"
        cap: Annotated[int, Field(ge=1)] | None
        """Most images of a class; it decides everything, so it has no default. null: as many as the smallest class
        has, which makes the subset balanced."""
        seed: int = 0
        """Another number chooses other images; not the run's seed, so that runs share a subset."""

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        cap = config.cap or int(self.counts_C.min())
        self.kept_C = np.minimum(self.counts_C, cap)
        order_N = permutation(key("capped", config.seed), len(labels))
        self.subset = first_of_each_class(labels, num_classes, cap, order_N)

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try."""
        return [Case(cls.Config(cap=10)), Case(cls.Config(cap=None, seed=1))]

    def chosen(self, source_key: int) -> np.ndarray:
        """See `PartSampler.chosen`."""
        del source_key
        return self.subset
