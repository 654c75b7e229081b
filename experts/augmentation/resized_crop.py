"""Random crops of a random size, resized to image_size, as torchvision's RandomResizedCrop.

Images in memory are cropped from their frame here. Streamed files are cropped from the whole picture where they are
decoded (experts/data/images.py), with the same draws.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from experts.augmentation.augmentation import Augmentation, AugmentationSettings
from experts.data.decode import CROP_UNIFORMS, crop_and_resize, resized_crop_boxes
from experts.data.resampling import enlarge, resample
from experts.registry import register

SMALL = 32
"""Side, pixels, up to which products of matrices take less time on a CPU than one image after the other."""


def _from_least_to_greatest(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale = [{scale[0]:g}, {scale[1]:g}]: needs 0 < least <= greatest <= 1")
    return scale


@register("augmentation", "resized_crop")
class ResizedCrop(Augmentation):
    """Crops a random share of the area, of aspect 3/4 to 4/3, and resizes it. The first piece of its stack.

    Source: torchvision's RandomResizedCrop of uint8 tensors, bilinear with anti-aliasing.
    """

    acts_on = "bytes"
    table = "crop"
    columns = tuple(f"crop {number}" for number in range(CROP_UNIFORMS))

    class Config(AugmentationSettings):
        name: Literal["resized_crop"] = "resized_crop"
        scale: Annotated[tuple[float, float], AfterValidator(_from_least_to_greatest)] = (0.08, 1.0)
        """Least and greatest share of the area."""

    def __call__(self, images_BcHW: Tensor, uniforms_BK: np.ndarray) -> Tensor:
        """See `Augmentation`."""
        return random_resized_crops(images_BcHW, uniforms_BK, self.config.scale)


def random_resized_crops(images_BcHW: Tensor, uniforms_BK: np.ndarray, scale: tuple[float, float]) -> Tensor:
    """Crop resident images at random and resize them back, uint8 [B, channels, S, S] to the same shape.

    Args:
        uniforms_BK: float64 [B, decode.CROP_UNIFORMS].
    """
    size = images_BcHW.shape[-1]
    boxes_B4 = resized_crop_boxes(size, size, scale, uniforms_BK)
    # Three ways to the same pixels. All images at once, but on a CPU where they are large: there torch's own kernel
    # takes a tenth to a third of the time, and it knows images of one size only.
    if images_BcHW.device.type != "cpu":
        return resample(images_BcHW, boxes_B4, size, size)
    if size <= SMALL:
        return enlarge(images_BcHW, boxes_B4)
    out = torch.empty_like(images_BcHW)
    for row, image in enumerate(images_BcHW):
        out[row] = crop_and_resize(image, boxes_B4[row], size)
    return out
