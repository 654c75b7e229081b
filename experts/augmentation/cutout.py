"""Cutout (DeVries, Taylor 2017): a black square at a random place."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.augmentation.augmentation import AugmentationSettings, Move
from experts.augmentation.moves import Places
from experts.registry import register


@register("augmentation", "cutout")
class Cutout(Move):
    """Blackens a square whose centre is any pixel; beyond the border there is less of it.

    Source: DeVries and Taylor 2017, arXiv:1708.04552. Differs: black before normalisation, as BALMS and PaCo have it;
    the paper's code blackens after it, which gives the mean colour.
    """

    columns = ("cutout_row", "cutout_column")

    class Config(AugmentationSettings):
        name: Literal["cutout"] = "cutout"
        size: Annotated[int, Field(ge=0)] = 16
        """Side of the square, pixels; an odd one is a pixel less, as published. 0 is off."""

        @property
        def is_off(self) -> bool:
            """See `AugmentationSettings`."""
            return self.size < 2

    def undo(self, places: Places, uniforms_BK: np.ndarray) -> None:
        """See `Move`."""
        centre_B2 = (uniforms_BK * [places.height, places.width]).astype(np.int64)
        reach = self.config.size // 2
        places.blacken(centre_B2 - reach, centre_B2 + reach)
