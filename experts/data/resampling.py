"""Bilinear resizing with anti-aliasing on a device that has no kernel for it, to the pixel as torch does on a CPU.

torch resizes uint8 images on a CPU only. It goes over columns, then over rows. Each output pixel is a weighted sum of
neighbours, the weights being integers: shares of 1 times the power of two at which the largest still fits 16 bits. The
sums are divided by that power, rounded, and clipped to 0 .. 255. The same integers here give the same pixels.

    table   = for every output pixel: first input pixel, weights of the T pixels from there on      # on the host
    columns = sum over taps t of weight[t] * image[..., first + t]                                  # on the device
    rows    = the same over the other axis

Shapes: B images, L lengths (as many as images, or 1 for all), T taps, S output pixels of an axis.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experts.data.transfer import to_device

_WEIGHT_LIMIT = 2**15  # weights are int16
_MAX_BITS = 22


def resample(images_BcHW: Tensor, boxes_L4: np.ndarray, height: int, width: int) -> Tensor:
    """Crop images and resize the crops, uint8 [B, channels, H, W] to [B, channels, height, width].

    Args:
        images_BcHW: on any device.
        boxes_L4: top, left, height and width of each crop, pixels, int64 [B, 4]; or [1, 4], one box for all images.

    Source: torch's `interpolate(mode="bilinear", antialias=True, align_corners=False)` of uint8 images on a CPU.
    """
    if not len(images_BcHW):
        return images_BcHW.new_empty((0, images_BcHW.shape[1], height, width))
    columns = _resample_axis(images_BcHW, boxes_L4[:, 1], boxes_L4[:, 3], width)
    return _resample_axis(columns.mT, boxes_L4[:, 0], boxes_L4[:, 2], height).mT.contiguous()


def _resample_axis(images_BcHW: Tensor, start_L: np.ndarray, length_L: np.ndarray, size: int) -> Tensor:
    """Return the stretches that begin at `start_L`, each `length_L` long, of the last axis at another size."""
    first_LS, weight_LST, bits_L = tap_table(length_L, size)
    taps = np.arange(weight_LST.shape[2])
    # Weights beyond the end of a stretch are 0; the index must stay inside the image all the same.
    index_LST = start_L[:, None, None] + np.minimum(first_LS[:, :, None] + taps, length_L[:, None, None] - 1)
    index, weight = to_device(np.stack([index_LST, weight_LST]), images_BcHW.device).movedim(3, 1)
    bits = to_device(bits_L, images_BcHW.device, torch.int32)[:, None, None, None]

    rows = (*images_BcHW.shape[:3], size)
    total = (torch.ones_like(bits) << (bits - 1)).expand(rows)  # one half, so that the shift below rounds
    for index_LS, weight_LS in zip(index, weight.int(), strict=True):
        pixels = images_BcHW.gather(3, index_LS[:, None, None].expand(rows))
        total = total + weight_LS[:, None, None] * pixels
    return (total >> bits).clamp(0, 255).to(torch.uint8)


def enlarge(images_BcSS: Tensor, boxes_B4: np.ndarray) -> Tensor:
    """Crop square images and resize the crops to the images' own size on a CPU, to the pixels of `resample`.

    One product of matrices over columns, then one over rows. Nothing is made smaller, so weights add up to 2^14 and
    sums stay below 2^24: float32 holds every one of them exactly.

    Args:
        images_BcSS: uint8.
        boxes_B4: top, left, height and width, pixels, inside of the images.
    """
    images, channels, size, _ = images_BcSS.shape
    if not images:
        return images_BcSS
    columns_BSS = _matrices(boxes_B4[:, 1], boxes_B4[:, 3], size)
    rows_BSS = _matrices(boxes_B4[:, 0], boxes_B4[:, 2], size)
    wide = torch.bmm(images_BcSS.reshape(images, channels * size, size).float(), columns_BSS.mT)
    wide = wide.add_(0.5).floor_().clamp_(0, 255)
    tall = wide.view(images, channels, size, size).transpose(1, 2).reshape(images, size, channels * size)
    done = torch.bmm(rows_BSS, tall).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return done.view(images, size, channels, size).transpose(1, 2).contiguous()


def _matrices(start_B: np.ndarray, length_B: np.ndarray, size: int) -> Tensor:
    """Return the weights of every input pixel (last axis) in every output pixel, float32 [B, S, S], as shares of 1."""
    first_BS, weight_BST, bits_B = tap_table(length_B, size)
    assert bits_B.max() <= 16, "sums would not be exact"
    found_BSS = np.zeros((len(start_B), size, size), dtype=np.float32)
    image, place = np.ogrid[: len(start_B), :size]
    for tap in range(weight_BST.shape[2]):
        taken_BS = start_B[:, None] + np.minimum(first_BS + tap, length_B[:, None] - 1)
        found_BSS[image, place, taken_BS] += weight_BST[:, :, tap]
    return torch.from_numpy(found_BSS * 2.0 ** -bits_B[:, None, None].astype(np.float32))


def tap_table(length_L: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the input pixels that make up each output pixel.

    Args:
        length_L: pixels of the input, int64, each at least 1.
        size: S, pixels of the output.

    Returns:
        The first input pixel int64 [L, S], the weights of it and the next ones int64 [L, S, T], and the binary digits
        of the weights int64 [L]: they sum to about 2 to that power.
    """
    scale_L = length_L / size
    reach_L = np.maximum(scale_L, 1.0)  # of the triangle: one output pixel, at least one input pixel
    centre_LS = scale_L[:, None] * (np.arange(size) + 0.5)
    first_LS = np.maximum((centre_LS - reach_L[:, None] + 0.5).astype(np.int64), 0)
    last_LS = np.minimum((centre_LS + reach_L[:, None] + 0.5).astype(np.int64), length_L[:, None])

    place_LST = first_LS[:, :, None] + np.arange(2 * int(np.ceil(reach_L.max())) + 1)
    distance_LST = np.abs(place_LST - centre_LS[:, :, None] + 0.5) * (1 / reach_L)[:, None, None]
    share_LST = np.where(place_LST < last_LS[:, :, None], np.maximum(1 - distance_LST, 0.0), 0.0)
    share_LST /= np.add.accumulate(share_LST, axis=2)[:, :, -1:]  # added in order, as torch does; `sum` adds in pairs

    # 0.5 + the largest weight is below the limit at these digits, and not at one more.
    largest_L1 = share_LST.max(axis=(1, 2))[:, None]
    fits_LN = (0.5 + largest_L1 * 2.0 ** np.arange(1, _MAX_BITS + 1)).astype(np.int64) < _WEIGHT_LIMIT
    bits_L = fits_LN.sum(axis=1)
    return first_LS, (0.5 + share_LST * 2.0 ** bits_L[:, None, None]).astype(np.int64), bits_L
