"""The box that CutMix and CMO cut out of one image and paste into another, at the same place.

Shapes: N images, S = image_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from experts.data.transfer import to_device


class Box(NamedTuple):
    """Columns left .. right - 1 and rows top .. bottom - 1 of an image; it may be empty."""

    left: int
    top: int
    right: int
    bottom: int

    def share_left(self, size: int) -> float:
        """Return the share of a square image that lies outside the box."""
        return 1 - (self.right - self.left) * (self.bottom - self.top) / size**2


class Generator(Protocol):
    """A generator that a box is drawn with."""

    def betavariate(self, alpha: float, beta: float) -> float:
        """Return a number from Beta(alpha, beta)."""
        ...

    def randint(self, a: int, b: int) -> int:
        """Return a uniform whole number, a and b included."""
        ...


def draw_box(generator: Generator, alpha: float, size: int) -> Box:
    """Draw the share of the image that would stay, from Beta(alpha, alpha), then the centre's column, then its row.

    Source: Yun et al. 2019 (CutMix), arXiv:1905.04899, in the order of the published code, which names the axes x and y
    the other way round; images are square, and both are drawn alike.
    """
    share = generator.betavariate(alpha, alpha)
    column, row = generator.randint(0, size - 1), generator.randint(0, size - 1)
    return box_around(column, row, share, size)


def box_around(column: int, row: int, share: float, size: int) -> Box:
    """Return the box around a pixel that would leave a share of the image, clipped to the image.

    Args:
        column, row: of the centre, in [0, size).
        share: in [0, 1]; the side is sqrt(1 - share) of the image's, rounded down to an even number of pixels.
        size: of the image, pixels.
    """
    half = int(size * math.sqrt(1 - share)) // 2
    left, top, right, bottom = (
        min(max(edge, 0), size) for edge in (column - half, row - half, column + half, row + half)
    )
    return Box(left, top, right, bottom)


def paste(images_N3SS: Tensor, others_N3SS: Tensor, boxes: Sequence[Box], counts: Sequence[int]) -> Tensor:
    """Return images with a box of others in them. Both are written to.

    Args:
        images_N3SS, others_N3SS: paired by row, on one device.
        boxes: each for the next so many images, as `counts` says.
        counts: their sum is N.
    """
    if len(boxes) == 1:  # a single step, as on a CPU: nothing beside the box is touched
        [box] = boxes
        place = (..., slice(box.top, box.bottom), slice(box.left, box.right))
        images_N3SS[place] = others_N3SS[place]
        return images_N3SS
    size, device = images_N3SS.shape[-1], images_N3SS.device
    edges_4N = np.repeat(np.array(boxes), counts, axis=0).T
    left_N1, top_N1, right_N1, bottom_N1 = to_device(edges_4N, device)[:, :, None]
    place_S = torch.arange(size, device=device)
    columns_NS = (place_S >= left_N1) & (place_S < right_N1)
    rows_NS = (place_S >= top_N1) & (place_S < bottom_N1)
    inside_N1SS = (rows_NS[:, :, None] & columns_NS[:, None, :])[:, None]
    return torch.where(inside_N1SS, others_N3SS, images_N3SS, out=others_N3SS)
