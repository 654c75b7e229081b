"""Mirroring left and right, as torchvision's RandomHorizontalFlip."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.augmentation.augmentation import AugmentationSettings, Move
from experts.augmentation.moves import Places
from experts.registry import register


@register("augmentation", "flip")
class Flip(Move):
    """Mirrors some images left and right.

    Source: torchvision's RandomHorizontalFlip.
    """

    columns = ("flip",)

    class Config(AugmentationSettings):
        name: Literal["flip"] = "flip"
        probability: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of the images that are mirrored."""

        @property
        def is_off(self) -> bool:
            """See `AugmentationSettings`."""
            return not self.probability

    def undo(self, places: Places, uniforms_BK: np.ndarray) -> None:
        """See `Move`."""
        places.mirror(uniforms_BK[:, 0] < self.config.probability)
