"""Turns by 0, 90, 180 or 270 degrees, which auxiliaries may guess."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from experts.augmentation.augmentation import AugmentationSettings, Move
from experts.augmentation.moves import Places
from experts.registry import register


@register("augmentation", "quarter_turn")
class QuarterTurn(Move):
    """Turns each image counter-clockwise by 0 to 3 right angles; every number is as likely.

    Source: Gidaris et al. 2018, arXiv:1803.07728; Yang and Xu 2020, arXiv:2006.07529, published code.
    Differs: published code deals the four turns out in each batch, so that they come equally often in it; here each
    image draws its own.
    """

    columns = ("quarter_turn",)
    told_values: ClassVar[int] = 4

    class Config(AugmentationSettings):
        name: Literal["quarter_turn"] = "quarter_turn"

    def told(self, uniforms_BK: np.ndarray) -> np.ndarray:
        """Return the number of right angles, 0 to 3."""
        return (uniforms_BK[:, 0] * self.told_values).astype(np.int64)

    def undo(self, places: Places, uniforms_BK: np.ndarray) -> None:
        """See `Move`."""
        places.turn(90.0 * self.told(uniforms_BK))
