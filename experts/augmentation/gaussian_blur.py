"""Gaussian blur of a random width, as SimCLR's and MoCo's published code blurs.

Shapes: B images, T taps of the kernel.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn.functional import pad

from experts.augmentation.augmentation import Augmentation, AugmentationSettings
from experts.data.transfer import to_device
from experts.registry import register


def _from_least_to_greatest(sigma: tuple[float, float]) -> tuple[float, float]:
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError(f"sigma = {list(sigma)}: needs 0 < least <= greatest")
    return sigma


@register("augmentation", "gaussian_blur")
class GaussianBlur(Augmentation):
    """Blurs some images by a standard deviation drawn per image.

    Source: Pillow's GaussianBlur as MoCo v2's published code calls it. Differs: no rounding to 8 bits; this is the
    Gaussian that Pillow approaches by three box blurs.
    """

    columns = ("blurred", "sigma")

    class Config(AugmentationSettings):
        name: Literal["gaussian_blur"] = "gaussian_blur"
        probability: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of the images that are blurred."""
        sigma: Annotated[tuple[float, float], AfterValidator(_from_least_to_greatest)] = (0.1, 2.0)
        """Least and greatest standard deviation, pixels."""

        @property
        def is_off(self) -> bool:
            """See `AugmentationSettings`."""
            return not self.probability

    def __call__(self, images_BcHW: Tensor, uniforms_BK: np.ndarray) -> Tensor:
        """See `Augmentation`."""
        rows = np.flatnonzero(uniforms_BK[:, 0] < self.config.probability)
        if not len(rows):
            return images_BcHW
        low, high = self.config.sigma
        chosen = to_device(rows, images_BcHW.device)
        blurred = blur(images_BcHW[chosen], low + (high - low) * uniforms_BK[rows, 1], high)
        return images_BcHW.index_copy(0, chosen, blurred)


def blur(pixels_B3HW: Tensor, sigma_B: np.ndarray, most: float) -> Tensor:
    """Blur each image with a Gaussian of its own standard deviation; border pixels are repeated outwards.

    Args:
        sigma_B: standard deviations, pixels.
        most: their upper bound, which decides how far the kernels reach.
    """
    reach = min(math.ceil(3 * most), *pixels_B3HW.shape[-2:])  # 3 standard deviations hold 99.7 % of a Gaussian
    taps_T = np.arange(-reach, reach + 1)
    kernel_BT = np.exp(-0.5 * (taps_T / sigma_B[:, None]) ** 2)
    kernel_TB = to_device((kernel_BT / kernel_BT.sum(axis=1, keepdims=True)).T, pixels_B3HW.device, pixels_B3HW.dtype)

    # A Gaussian over the plane is one over columns, then one over rows.
    for axis in (2, 3):
        edges = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        padded = pad(pixels_B3HW, edges, mode="replicate")
        size = pixels_B3HW.shape[axis]
        pixels_B3HW = torch.zeros_like(pixels_B3HW)
        for tap in range(2 * reach + 1):
            pixels_B3HW.addcmul_(padded.narrow(axis, tap, size), kernel_TB[tap][:, None, None, None])
    return pixels_B3HW
