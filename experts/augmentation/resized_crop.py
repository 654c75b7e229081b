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
from experts.data.decode import CROP_UNIFORMS, resized_crop, resized_crop_box
from experts.data.resampling import resample
from experts.registry import register


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
    if images_BcHW.device.type != "cpu":  # all images at once, to the same pixels
        boxes = [resized_crop_box(size, size, scale, uniforms_K) for uniforms_K in uniforms_BK]
        return resample(images_BcHW, np.array(boxes, dtype=np.int64), size, size)
    out = torch.empty_like(images_BcHW)
    for row, image in enumerate(images_BcHW):
        out[row] = resized_crop(image, size, scale, uniforms_BK[row])
    return out
