"""RandAugment (Cubuk, Zoph, Shlens, Le, NeurIPS 2020): operations drawn alike from a list, all at one magnitude.

Shapes: B images, K = 2 columns for each operation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from experts.augmentation.augmentation import Augmentation, AugmentationSettings
from experts.augmentation.operations import MAGNITUDES, SIGNED, apply
from experts.registry import register

LIST = tuple(name for name in MAGNITUDES if name != "invert")
STRONGEST = 30


@register("augmentation", "randaugment")
class RandAugment(Augmentation):
    """Applies some operations of 14, one after the other, drawn per image with repetition.

    Source: Cubuk et al. 2020, arXiv:1909.13719, as torchvision's RandAugment: its list, its 31 magnitudes from none to
    strongest, a fair coin for the direction of an operation that has one, nearest pixels, black outside.
    Differs: other published code (timm, which PaCo uses) has another list and draws magnitudes around the one given.
    """

    acts_on = "bytes"

    class Config(AugmentationSettings):
        name: Literal["randaugment"] = "randaugment"
        operations: Annotated[int, Field(ge=1, le=14)] = 2
        """Number applied to each image; N in the paper."""
        magnitude: Annotated[int, Field(ge=0, le=STRONGEST)] = 9
        """From 0 (none) to 30 (strongest); M in the paper."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        turns = range(config.operations)
        self.columns = tuple(f"{what} {turn}" for turn in turns for what in ("operation", "sign"))

    def __call__(self, images_BcHW: Tensor, uniforms_BK: np.ndarray) -> Tensor:
        """See `Augmentation`."""
        side = images_BcHW.shape[-1]
        magnitudes = np.array([MAGNITUDES[name](STRONGEST + 1, side)[self.config.magnitude] for name in LIST])
        signed = np.isin(LIST, SIGNED)
        for turn in range(self.config.operations):
            drawn_B = (uniforms_BK[:, 2 * turn] * len(LIST)).astype(np.int64)
            negative_B = (uniforms_BK[:, 2 * turn + 1] < 0.5) & signed[drawn_B]
            names_B = np.array(LIST)[drawn_B]
            images_BcHW = apply(images_BcHW, names_B, np.where(negative_B, -1, 1) * magnitudes[drawn_B])
        return images_BcHW
