"""Random brightness, contrast, saturation and hue, as torchvision's ColorJitter.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from experts.augmentation.augmentation import Augmentation, AugmentationSettings
from experts.augmentation.pixels import grey, per_channel
from experts.cases import Case
from experts.data.transfer import to_device
from experts.registry import register

Strength = Annotated[float, Field(ge=0, le=1)]

ORDERS = np.array(list(itertools.permutations(range(3))))  # of brightness 0, contrast 1, saturation 2
HUE_ORDERS = np.array(list(itertools.permutations(range(4))))  # and hue 3


@register("augmentation", "color_jitter")
class ColorJitter(Augmentation):
    """Changes colours by factors drawn per image, in an order drawn per image.

    Source: torchvision's ColorJitter, within RandomApply where the probability is below 1. Differs: no rounding to 8
    bits between the changes, as Pillow images have.

    Args:
        config: see `Config`.
        with_hue: draw among the orders of four changes although hue is 0.
    """

    class Config(AugmentationSettings):
        name: Literal["color_jitter"] = "color_jitter"
        brightness: Strength = 0.4
        """Factor from [1 - strength, 1 + strength]."""
        contrast: Strength = 0.4
        """Factor from [1 - strength, 1 + strength]."""
        saturation: Strength = 0.4
        """Factor from [1 - strength, 1 + strength]."""
        hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
        """Turn of the colour circle from [-strength, strength]; 1 is a full turn."""
        probability: Annotated[float, Field(ge=0, le=1)] = 1.0
        """Share of the images that are changed."""

        @property
        def is_off(self) -> bool:
            """See `AugmentationSettings`."""
            return not (self.probability and any((self.brightness, self.contrast, self.saturation, self.hue)))

    def __init__(self, config: Any, *, with_hue: bool = False) -> None:
        super().__init__(config)
        self._with_hue = with_hue or config.hue > 0 or config.probability < 1
        self.columns = ("brightness", "contrast", "saturation", "order")
        if self._with_hue:
            self.columns += ("hue", "jittered")

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Piece`."""
        return [Case(cls.Config()), Case(cls.Config(hue=0.1, probability=0.8))]

    def __call__(self, images_BcHW: Tensor, uniforms_BK: np.ndarray) -> Tensor:
        """See `Augmentation`."""
        strengths = np.array([self.config.brightness, self.config.contrast, self.config.saturation])
        factors_B3 = 1 + (2 * uniforms_BK[:, :3] - 1) * strengths
        if not self._with_hue:
            return _three_changes(images_BcHW, factors_B3, _drawn(ORDERS, uniforms_BK[:, 3]))
        rows = np.flatnonzero(uniforms_BK[:, 5] < self.config.probability)
        if not len(rows):
            return images_BcHW
        changes_B4 = np.column_stack([factors_B3, (2 * uniforms_BK[:, 4] - 1) * self.config.hue])
        orders_B4 = _drawn(HUE_ORDERS, uniforms_BK[:, 3])
        chosen = to_device(rows, images_BcHW.device)
        changed = _four_changes(images_BcHW[chosen], changes_B4[rows], orders_B4[rows])
        return images_BcHW.index_copy(0, chosen, changed)


def _drawn(orders: np.ndarray, uniforms_B: np.ndarray) -> np.ndarray:
    """Return an order for each image."""
    found: np.ndarray = orders[(uniforms_B * len(orders)).astype(np.int64)]
    return found


def _three_changes(pixels_B3HW: Tensor, factors_B3: np.ndarray, order_B3: np.ndarray) -> Tensor:
    """Change brightness, contrast and saturation, all images at once.

    Each of the three blends the image with a reference and clips to 0..1. The references are black, the image's mean
    grey, and the grey image. So in each of three rounds a single blend does what every image's order asks for: only
    factor and reference differ from image to image.
    """
    rows_B = np.arange(len(order_B3))
    for turn in range(3):
        operation_B = order_B3[:, turn]
        # One table, so that factors and masks go to the device in one transfer.
        table_3B = np.stack([factors_B3[rows_B, operation_B], operation_B == 1, operation_B == 2])
        factor, is_contrast, is_saturation = to_device(table_3B, pixels_B3HW.device, pixels_B3HW.dtype)[
            :, :, None, None, None
        ]

        grey_B1HW = grey(pixels_B3HW)
        mean_B111 = grey_B1HW.mean((1, 2, 3), keepdim=True)
        reference = is_saturation * grey_B1HW + is_contrast * mean_B111
        pixels_B3HW = (factor * pixels_B3HW + (1 - factor) * reference).clamp_(0, 1)
    return pixels_B3HW


def _four_changes(pixels_B3HW: Tensor, changes_B4: np.ndarray, order_B4: np.ndarray) -> Tensor:
    """Change brightness, contrast, saturation and hue in four rounds; `pixels_B3HW` is written to."""
    for turn in range(4):
        for operation in range(4):
            rows = np.flatnonzero(order_B4[:, turn] == operation)
            if not len(rows):
                continue
            chosen = to_device(rows, pixels_B3HW.device)
            amount = to_device(changes_B4[rows, operation], pixels_B3HW.device, pixels_B3HW.dtype)
            pixels_B3HW[chosen] = _change(pixels_B3HW[chosen], operation, amount[:, None, None, None])
    return pixels_B3HW


def _change(pixels: Tensor, operation: int, amount_B111: Tensor) -> Tensor:
    """Blend with black, with the mean grey or with the grey image; or turn the hue."""
    if operation == 3:
        return turn_hue(pixels, amount_B111)
    if operation == 0:
        return (amount_B111 * pixels).clamp(0, 1)
    reference = grey(pixels)
    if operation == 1:
        reference = reference.mean((1, 2, 3), keepdim=True)
    return (amount_B111 * pixels + (1 - amount_B111) * reference).clamp(0, 1)


def turn_hue(pixels_B3HW: Tensor, turn_B111: Tensor) -> Tensor:
    """Turn the hue of HSV, 1 being a full turn; value and saturation stay.

    Without going through HSV: with m the least and v the greatest of red, green, blue and h the hue in sixths, each
    channel is v - (v - m) * clip(distance, 0, 1), its distance a fixed piecewise linear function of h.

    Source: torchvision's adjust_hue, to rounding.
    """
    # The brightest channel (0 red, 1 green, 2 blue) gives the hue to within a sixth of a turn either way.
    most, brightest = pixels_B3HW.max(dim=1, keepdim=True)
    span = most - pixels_B3HW.min(dim=1, keepdim=True).values
    red, green, blue = pixels_B3HW.split(1, dim=1)
    # Grey pixels have span 0 and no hue: the least divisor gives them 0 / tiny = 0, and span 0 keeps them grey.
    sixths = torch.where(
        brightest == 0, green - blue, torch.where(brightest == 1, blue - red, red - green)
    ) / span.clamp(min=torch.finfo(span.dtype).tiny) + 2 * brightest.to(span.dtype)
    turned = sixths + 6 * turn_B111
    place = (turned + per_channel((5.0, 3.0, 1.0), span.device, span.dtype)).remainder(6)
    return most - span * torch.minimum(place, 4 - place).clamp(0, 1)
