"""Random crops from a black border, as torchvision's RandomCrop with padding."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.augmentation.augmentation import AugmentationSettings, Move
from experts.augmentation.moves import Places
from experts.registry import register


@register("augmentation", "crop")
class Crop(Move):
    """Pads images with black and crops image_size at random.

    Source: torchvision's RandomCrop(size, padding).
    """

    columns = ("crop_top", "crop_left")

    class Config(AugmentationSettings):
        name: Literal["crop"] = "crop"
        padding: Annotated[int, Field(ge=0)] = 4
        """Pixels of black on each side; 0 is off."""

        @property
        def is_off(self) -> bool:
            """See `AugmentationSettings`."""
            return not self.padding

    def undo(self, places: Places, uniforms_BK: np.ndarray) -> None:
        """See `Move`."""
        padding = self.config.padding
        offset_B2 = (uniforms_BK * (2 * padding + 1)).astype(np.int64) - padding
        places.shift(offset_B2[:, 0], offset_B2[:, 1])
