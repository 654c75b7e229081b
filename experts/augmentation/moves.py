"""Moves of whole pixels: where each pixel of the result comes from. Several moves become one gather.

Shapes: B images of height H and width W.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experts.augmentation.pixels import counted
from experts.data.transfer import to_device


class Places:
    """The source of every pixel of a batch, read backwards: begin with the last move and undo one after the other.

    Shifts and mirrors are whole numbers per image, y + a and b + c x, and add up on the host. Turns need numbers of
    full size on the device.
    """

    def __init__(self, images: int, height: int, width: int, device: torch.device) -> None:
        self.images, self.height, self.width, self.device = images, height, width, device
        self._y, self._x = counted(height, device)[None, :, None], counted(width, device)[None, None, :]
        self._inside: Tensor | None = None
        self._begin_line()

    def _begin_line(self) -> None:
        self._sign_B = np.ones(self.images, dtype=np.int64)
        self._start_B, self._down_B = np.zeros((2, self.images), dtype=np.int64)
        self._moved = self._shifted = False

    def mirror(self, chosen_B: np.ndarray) -> None:
        """Undo mirroring left and right of chosen images."""
        self._sign_B = np.where(chosen_B, -self._sign_B, self._sign_B)
        self._start_B = np.where(chosen_B, self.width - 1 - self._start_B, self._start_B)
        self._moved = True

    def shift(self, down_B: np.ndarray, right_B: np.ndarray) -> None:
        """Undo a crop that begins so many pixels further down and right; what it has from outside is black."""
        if self._shifted:
            self._end_line()
        self._down_B, self._start_B = self._down_B + down_B, self._start_B + right_B
        self._moved = self._shifted = True

    def turn(self, degrees_B: np.ndarray) -> None:
        """Undo turns counter-clockwise, to the nearest pixel; corners that come from outside are black."""
        self._end_line()
        angle_B = np.deg2rad(degrees_B)
        cos_B11, sin_B11 = to_device(np.stack([np.cos(angle_B), np.sin(angle_B)]), self.device)[:, :, None, None]
        middle_y, middle_x = (self.height - 1) / 2, (self.width - 1) / 2
        y, x = self._y.double() - middle_y, self._x.double() - middle_x
        # Of the first turn, the products have shape [B, H, 1] and [B, 1, W]; only their sums have full size.
        turned_x, turned_y = cos_B11 * x - sin_B11 * y, sin_B11 * x + cos_B11 * y
        self._y, self._x = (turned_y + middle_y).round_().long(), (turned_x + middle_x).round_().long()
        self._check()

    def warp(self, matrix_B6: np.ndarray) -> None:
        """Undo affine maps, to the nearest pixel: x comes from m0 x + m1 y + m2, y from m3 x + m4 y + m5."""
        self._end_line()
        m = to_device(matrix_B6.T, self.device)[:, :, None, None]
        x, y = self._x.double(), self._y.double()
        # Of the first map, the products have shape [B, H, 1] and [B, 1, W], as in `turn`.
        from_x, from_y = m[0] * x + (m[1] * y + m[2]), m[3] * x + (m[4] * y + m[5])
        self._x, self._y = from_x.round_().long(), from_y.round_().long()
        self._check()

    def blacken(self, first_B2: np.ndarray, stop_B2: np.ndarray) -> None:
        """Undo a black box from a row and a column on, up to others, which are left out."""
        self._end_line()
        top, left, bottom, right = to_device(np.hstack([first_B2, stop_B2]).T, self.device)[:, :, None, None]
        outside = ((self._y < top) | (self._y >= bottom)) | ((self._x < left) | (self._x >= right))
        self._inside = outside if self._inside is None else self._inside & outside

    def take(self, images_BcHW: Tensor) -> Tensor:
        """Return the images with every pixel at its new place, of the same type; what comes from outside is black."""
        self._end_line()
        if self._inside is None:
            return images_BcHW
        batch, channels, height, width = images_BcHW.shape
        # The gather must stay inside the image, so places are clamped; the last line blackens what was outside.
        index_BHW = self._y.clamp(0, height - 1) * width + self._x.clamp(0, width - 1)
        index_B1P = index_BHW.expand(batch, height, width).reshape(batch, 1, height * width)
        pixels_BcP = images_BcHW.reshape(batch, channels, height * width)
        moved_BcP = pixels_BcP.gather(2, index_B1P.expand(-1, channels, -1))
        return moved_BcP.view(batch, channels, height, width) * self._inside[:, None]

    def _end_line(self) -> None:
        """Carry out the shifts and mirrors that have added up."""
        if not self._moved:
            return
        line_3B11 = to_device(np.stack([self._sign_B, self._start_B, self._down_B]), self.device)[:, :, None, None]
        self._x = self._x * line_3B11[0] + line_3B11[1]
        self._y = self._y + line_3B11[2]
        self._check()
        self._begin_line()

    def _check(self) -> None:
        """Note which pixels come from inside the image."""
        inside = ((self._y >= 0) & (self._y < self.height)) & ((self._x >= 0) & (self._x < self.width))
        self._inside = inside if self._inside is None else self._inside & inside
