"""Pixels as bytes and as numbers, and what all augmentations need of them.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from experts.data.transfer import to_device

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, of red, green, blue


def to_numbers(images_BcHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels scaled from 0..255 to 0..1, one channel repeated onto three: a new tensor [B, 3, H, W]."""
    pixels = images_BcHW.to(dtype).div_(255)
    return pixels.repeat(1, 3, 1, 1) if pixels.shape[1] == 1 else pixels


def to_bytes(pixels_B3HW: Tensor) -> Tensor:
    """Return pixels of 0..1 as the nearest of 0..255, uint8, as images of 8 bits hold them between two changes."""
    return (pixels_B3HW * 255).round_().clamp_(0, 255).to(torch.uint8)


def normalised(pixels_B3HW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the mean of each channel and divide by its deviation; `pixels_B3HW` is written to.

    Returns:
        [B, 3, H, W], contiguous.
    """
    device, dtype = pixels_B3HW.device, pixels_B3HW.dtype
    shifted = pixels_B3HW.sub_(per_channel(tuple(mean), device, dtype))
    return shifted.div_(per_channel(tuple(std), device, dtype)).contiguous()


def grey(pixels_B3HW: Tensor) -> Tensor:
    """Return the brightness of pixels as numbers, [B, 1, H, W]."""
    red, green, blue = pixels_B3HW.unbind(1)
    return (GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue)[:, None]


# Constants are made once for each device and type: making one anew is a copy and two launches in every batch.


@lru_cache(maxsize=64)
def per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number for each channel, [channels, 1, 1]; shared, so not to be written to."""
    return to_device(torch.tensor(values, dtype=dtype)[:, None, None], device)


@lru_cache(maxsize=64)
def counted(count: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return 0, 1, ... count - 1; shared, so not to be written to."""
    return torch.arange(count, device=device, dtype=dtype)
