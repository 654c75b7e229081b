"""Turns by a random angle, as torchvision's RandomRotation."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.augmentation.augmentation import AugmentationSettings, Move
from experts.augmentation.moves import Places
from experts.registry import register


@register("augmentation", "rotation")
class Rotation(Move):
    """Turns images by up to an angle, either way; nearest pixel, black corners.

    Source: torchvision's RandomRotation, nearest. Differs: places in float64, so that 1 pixel in 1000 at most, halfway
    between two, is the other one.
    """

    columns = ("rotation",)

    class Config(AugmentationSettings):
        name: Literal["rotation"] = "rotation"
        degrees: Annotated[float, Field(ge=0, le=180)] = 15.0
        """Greatest angle, degrees; 0 is off."""

        @property
        def is_off(self) -> bool:
            """See `AugmentationSettings`."""
            return not self.degrees

    def undo(self, places: Places, uniforms_BK: np.ndarray) -> None:
        """See `Move`."""
        places.turn((2 * uniforms_BK[:, 0] - 1) * self.config.degrees)
