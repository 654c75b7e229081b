"""Random under-sampling: every class is cut down to the size of the smallest, or to a given size."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.data.keyed_random import key, permutation
from experts.registry import Settings, register
from experts.samplers.draws import first_of_each_class
from experts.samplers.sampler import PartSampler


@register("sampler", "undersampled")
class Undersampled(PartSampler):
    """The same number of images of each class, another choice every epoch; a smaller class gives all that it has.

    No class is left out, however few images the smallest has.
    """

    class Config(Settings):
        name: Literal["undersampled"] = "undersampled"
        per_class: Annotated[int, Field(ge=1)] | None = None
        """Images of each class per epoch; null: as many as the smallest class has."""

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        self.per_class = config.per_class or int(self.counts_C.min())
        self.kept_C = np.minimum(self.counts_C, self.per_class)

    def chosen(self, source_key: int) -> np.ndarray:
        """See `PartSampler.chosen`."""
        order_N = permutation(key(source_key, "choice"), len(self.labels))
        return first_of_each_class(self.labels, len(self.counts_C), self.per_class, order_N)
