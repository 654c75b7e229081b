"""The operations that RandAugment and AutoAugment choose from, on bytes, each image with a magnitude of its own.

Source: torchvision's functional transforms of uint8 tensors, value by value. Differs: places of the affine ones are
computed in float64, theirs in float32, so that a pixel halfway between two may be the other one.

Shapes: B images of height H and width W, c channels, P = H W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts.augmentation.moves import Places
from experts.augmentation.pixels import GREY_WEIGHTS, counted
from experts.data.transfer import to_device

MAGNITUDES: dict[str, Callable[[int, int], np.ndarray]] = {
    "identity": lambda bins, side: np.zeros(bins),
    "shear_x": lambda bins, side: np.linspace(0, 0.3, bins),
    "shear_y": lambda bins, side: np.linspace(0, 0.3, bins),
    "translate_x": lambda bins, side: np.linspace(0, 150 / 331 * side, bins),
    "translate_y": lambda bins, side: np.linspace(0, 150 / 331 * side, bins),
    "rotate": lambda bins, side: np.linspace(0, 30, bins),
    "brightness": lambda bins, side: np.linspace(0, 0.9, bins),
    "color": lambda bins, side: np.linspace(0, 0.9, bins),
    "contrast": lambda bins, side: np.linspace(0, 0.9, bins),
    "sharpness": lambda bins, side: np.linspace(0, 0.9, bins),
    "posterize": lambda bins, side: 8 - np.round(np.arange(bins) / ((bins - 1) / 4)),
    "solarize": lambda bins, side: np.linspace(255, 0, bins),
    "autocontrast": lambda bins, side: np.zeros(bins),
    "equalize": lambda bins, side: np.zeros(bins),
    "invert": lambda bins, side: np.zeros(bins),
}
"""By operation, its magnitudes from weak to strong: takes how many there are and the side of the image, pixels."""

SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness")
"""Operations that go either way."""
AFFINE = SIGNED[:5]


def apply(images_BcHW: Tensor, names: np.ndarray, magnitude_B: np.ndarray) -> Tensor:
    """Return the images, each changed by one operation.

    Args:
        images_BcHW: uint8, c = 1 or 3; not written to.
        names: of the operations, [B].
        magnitude_B: float64, signed.
    """
    groups = dict[Any, list[str]]()
    for name in sorted(set(names.tolist()) - {"identity"}):
        groups.setdefault(_affine if name in AFFINE else _OPERATIONS[name], []).append(name)
    changed_BcHW = images_BcHW.clone()
    for operation, known in groups.items():  # a few launches for each operation, however many images it is for
        rows = np.flatnonzero(np.isin(names, known))
        chosen = to_device(rows, images_BcHW.device)
        given = (names[rows], magnitude_B[rows]) if operation is _affine else (magnitude_B[rows],)
        changed_BcHW.index_copy_(0, chosen, operation(images_BcHW.index_select(0, chosen), *given))
    return changed_BcHW


def _affine(images_BcHW: Tensor, names: np.ndarray, magnitude_B: np.ndarray) -> Tensor:
    """Shear, shift or turn images; nearest pixel, black outside.

    Source pixel of (x, y): x + m (y + 1/2) for a shear, whose fixed point is the upper left corner; x - m for a shift,
    m cut to a whole number; and a turn about the centre.
    """
    images, _, height, width = images_BcHW.shape
    matrix_B6 = np.tile([1.0, 0, 0, 0, 1, 0], (images, 1))  # x from (x, y, 1), then y
    for row, (name, m) in enumerate(zip(names.tolist(), magnitude_B.tolist(), strict=True)):
        if name == "shear_x":
            matrix_B6[row, 1:3] = m, m / 2
        elif name == "shear_y":
            matrix_B6[row, 3], matrix_B6[row, 5] = m, m / 2
        elif name == "rotate":
            cos, sin, x, y = np.cos(np.deg2rad(m)), np.sin(np.deg2rad(m)), (width - 1) / 2, (height - 1) / 2
            matrix_B6[row] = cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
        else:
            matrix_B6[row, 2 if name == "translate_x" else 5] = -int(m)
    places = Places(images, height, width, images_BcHW.device)
    places.warp(matrix_B6)
    return places.take(images_BcHW)


def _blend(images_BcHW: Tensor, others: Tensor, factor_B: np.ndarray) -> Tensor:
    """Return factor * images + (1 - factor) * others as bytes, cut off and not rounded as torchvision does."""
    # 1 less a rounded factor is another number, so the rest is computed in double.
    weights = to_device(np.stack([factor_B, 1 - factor_B]), images_BcHW.device, torch.float32)[:, :, None, None, None]
    return (weights[0] * images_BcHW + weights[1] * others).clamp(0, 255).to(torch.uint8)


def _grey(images_BcHW: Tensor) -> Tensor:
    if images_BcHW.shape[1] == 1:
        return images_BcHW
    red, green, blue = images_BcHW.unbind(1)
    return (GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue).to(torch.uint8)[:, None]


def _brightness(images_BcHW: Tensor, magnitude_B: np.ndarray) -> Tensor:
    return _blend(images_BcHW, torch.zeros_like(images_BcHW), 1 + magnitude_B)


def _color(images_BcHW: Tensor, magnitude_B: np.ndarray) -> Tensor:
    if images_BcHW.shape[1] == 1:
        return images_BcHW
    return _blend(images_BcHW, _grey(images_BcHW), 1 + magnitude_B)


def _contrast(images_BcHW: Tensor, magnitude_B: np.ndarray) -> Tensor:
    mean_B111 = _grey(images_BcHW).to(torch.float32).mean((1, 2, 3), keepdim=True)
    return _blend(images_BcHW, mean_B111, 1 + magnitude_B)


def _sharpness(images_BcHW: Tensor, magnitude_B: np.ndarray) -> Tensor:
    """Blend with a blurred image: the mean of 3 x 3 pixels, the middle one five times; the border stays."""
    height, width = images_BcHW.shape[2:]
    if height < 3 or width < 3:
        return images_BcHW
    wide = images_BcHW.to(torch.int16)
    total = 4 * wide[..., 1:-1, 1:-1]
    for down in range(3):
        for right in range(3):
            total = total + wide[..., down : height - 2 + down, right : width - 2 + right]
    blurred = images_BcHW.clone()
    blurred[..., 1:-1, 1:-1] = ((total + 6) // 13).to(torch.uint8)  # thirteenths are never halfway
    return _blend(images_BcHW, blurred, 1 + magnitude_B)


def _posterize(images_BcHW: Tensor, bits_B: np.ndarray) -> Tensor:
    """Keep the upper bits of every byte."""
    mask_B = (256 - 2.0 ** (8 - bits_B.astype(np.int64))).astype(np.uint8)
    return images_BcHW & to_device(mask_B, images_BcHW.device)[:, None, None, None]


def _solarize(images_BcHW: Tensor, threshold_B: np.ndarray) -> Tensor:
    """Invert bytes from a threshold on."""
    threshold = to_device(threshold_B, images_BcHW.device, torch.float32)[:, None, None, None]
    return torch.where(images_BcHW >= threshold, 255 - images_BcHW, images_BcHW)


def _autocontrast(images_BcHW: Tensor, magnitude_B: np.ndarray) -> Tensor:
    """Stretch each channel to 0 .. 255; a channel of one value stays."""
    del magnitude_B
    least = images_BcHW.amin((2, 3), keepdim=True).to(torch.float32)
    most = images_BcHW.amax((2, 3), keepdim=True).to(torch.float32)
    scale = 255 / (most - least)
    flat = most == least
    least, scale = least.masked_fill(flat, 0), scale.masked_fill(flat, 1)
    return ((images_BcHW - least) * scale).clamp(0, 255).to(torch.uint8)


def _equalize(images_BcHW: Tensor, magnitude_B: np.ndarray) -> Tensor:
    """Make each channel's values as frequent as each other, by a table of 256 values for each channel.

    With n(v) the number of pixels below v and s = n(largest) / 255, cut off: v becomes (n(v) + s / 2) / s, cut off.
    """
    del magnitude_B
    value_NP = images_BcHW.flatten(2).flatten(0, 1).long()
    channels, device = len(value_NP), value_NP.device
    # Along one axis, since there a GPU adds in a fixed order where it is asked to.
    place = (value_NP + 256 * counted(channels, device)[:, None]).flatten()
    count = torch.zeros(channels * 256, dtype=torch.int32, device=device).scatter_add_(
        0, place, torch.ones_like(place, dtype=torch.int32)
    )
    count_N256 = count.view(channels, 256)
    below_N256 = count_N256.cumsum(1) - count_N256
    step_N1 = below_N256.gather(1, value_NP.amax(1, keepdim=True)) // 255
    table_N256 = ((below_N256 + step_N1 // 2) // step_N1.clamp(min=1)).clamp(0, 255)
    table_N256 = torch.where(step_N1 == 0, counted(256, device), table_N256).to(torch.uint8)
    return table_N256.gather(1, value_NP).view(images_BcHW.shape)


def _invert(images_BcHW: Tensor, magnitude_B: np.ndarray) -> Tensor:
    del magnitude_B
    return 255 - images_BcHW


_OPERATIONS: dict[str, Callable[[Tensor, np.ndarray], Tensor]] = {
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
}
