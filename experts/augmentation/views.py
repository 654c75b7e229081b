"""Random views of test images, compared when weights are learnt without labels. Every draw is keyed and per image.

An image's view is a function of (seed, epoch, view, position in the test set). It depends neither on the image's batch
nor on the other images that are asked for.

The steps are crop, mirror, colour jitter, grey, blur and normalisation: the published order, except that mirroring
comes earlier. It commutes with the steps between.

Shapes: B images, S = image_size.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from experts.augmentation.augment import GREY_WEIGHTS, NUM_UNIFORMS, augment, per_channel, random_resized_crops
from experts.data.config import Augment, DatasetConfig
from experts.data.decode import CROP_UNIFORMS
from experts.data.images import FileImages, ImageStore, usable_cpus
from experts.data.keyed_random import key, uniforms
from experts.data.transfer import to_device
from experts.registry import Settings

Share = Annotated[float, Field(ge=0, le=1)]
SMALL_IMAGE = 64  # pixels; up to this size the default views are those of the published CIFAR script

# Columns of the uniform draws of one image, after those of `augment`.
JITTERED, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREYED, BLURRED, SIGMA = range(NUM_UNIFORMS, NUM_UNIFORMS + 9)
VIEW_UNIFORMS = NUM_UNIFORMS + 9

ORDERS = np.array(list(itertools.permutations(range(4))))  # brightness 0, contrast 1, saturation 2, hue 3


class Views(Settings):
    """Random changes of test images. The defaults are those of the published CIFAR script."""

    random_resized_crop: tuple[float, float] | None = None
    """Least and greatest share of the area that is cropped and resized to image_size; null is off."""
    crop_padding: Annotated[int, Field(ge=0)] = 4
    """Pixels of black on each side, from which image_size is cropped at random; 0 is off."""
    horizontal_flip: Share = 0.5
    """Probability of mirroring left and right."""
    jitter: Share = 0.8
    """Probability of changing colours, by the four strengths below."""
    brightness: Share = 0.4
    """Factor from [1 - strength, 1 + strength]."""
    contrast: Share = 0.4
    """Factor from [1 - strength, 1 + strength]."""
    saturation: Share = 0.4
    """Factor from [1 - strength, 1 + strength]."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Turn of the colour circle from [-strength, strength]; 1 is a full turn."""
    grey: Share = 0.2
    """Probability of turning the image grey."""
    blur: Share = 0.2
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of the blur, pixels."""

    @model_validator(mode="after")
    def _ranges(self) -> Views:
        if self.random_resized_crop is not None:
            low, high = self.random_resized_crop
            if not 0 < low <= high <= 1:
                raise ValueError(f"random_resized_crop = [{low:g}, {high:g}]: needs 0 < least <= greatest <= 1")
            if self.crop_padding:
                raise ValueError("crop_padding and random_resized_crop are both set; set crop_padding=0")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma = {list(self.blur_sigma)}: needs 0 < least <= greatest")
        return self


def default_views(config: DatasetConfig) -> dict[str, Any]:
    """Return the published views of a data set, as the keys of `Views` that differ from CIFAR's.

    Images above 64 pixels are cropped and resized, by 0.2 to 1 of the area (iNaturalist: 0.08 to 1), and blurred with
    probability 1/2. Nothing is mirrored where training mirrors nothing, as with digits.
    """
    values: dict[str, Any] = {}
    if config.image_size > SMALL_IMAGE:
        least = 0.08 if config.name == "inat18" else 0.2
        values = {"random_resized_crop": (least, 1.0), "crop_padding": 0, "blur": 0.5}
    if not config.augment.horizontal_flip:
        values["horizontal_flip"] = 0.0
    return values


class ViewMaker:
    """Makes views of the images of one store."""

    def __init__(
        self,
        store: ImageStore,
        config: DatasetConfig,
        views: Views,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Read nothing yet.

        Args:
            store: test images, as evaluation sees them.
            config: of the data set; gives size and normalisation.
            dtype: of the result and of the arithmetic.
        """
        if isinstance(store, FileImages) and views.random_resized_crop is not None:
            store = replace(store, resize=None, crop_scale=views.random_resized_crop)
        self.store, self.views = store, views
        self.seed, self.device, self.dtype = seed, torch.device(device), dtype
        self._config = config
        # `augment` only crops and mirrors here: colours change after it, and normalising must come last.
        moves = Augment(crop_padding=views.crop_padding, horizontal_flip=views.horizontal_flip)
        self._moves = config.model_copy(update={"augment": moves, "mean": (0.0,) * 3, "std": (1.0,) * 3})
        self._tables: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def make(self, positions: np.ndarray, epoch: int, view: int) -> Tensor:
        """Return one view of some images, normalised, [B, 3, S, S] on the device.

        Args:
            positions: in the store, int64 [B].
            epoch, view: other numbers give other views.

        Raises:
            ValueError: an image file is missing or damaged; names it.
        """
        crops_BK, draws_BK = self._draws(positions, epoch, view)
        if isinstance(self.store, FileImages):
            images = to_device(_read_on_threads(self.store, positions, crops_BK), self.device)
        else:
            images = to_device(self.store.take(positions), self.device)
            if self.views.random_resized_crop is not None:
                images = random_resized_crops(images, crops_BK, self.views.random_resized_crop)
        pixels = augment(images, draws_BK[:, :NUM_UNIFORMS], self._moves, self.dtype)
        return normalise(change_colours(pixels, draws_BK, self.views), self._config)

    def _draws(self, positions: np.ndarray, epoch: int, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of the keyed tables; the tables of the current view are cached from batch to batch."""
        if self._tables is None or self._tables[0] != (epoch, view):
            # A row for every image of the store, so that a draw does not depend on the images asked for with it.
            tables = [
                uniforms(key(self.seed, "views", epoch, view, what), 0, len(self.store), width)
                for what, width in (("crop", CROP_UNIFORMS), ("pixels", VIEW_UNIFORMS))
            ]
            self._tables = (epoch, view), tables[0], tables[1]
        return self._tables[1][positions], self._tables[2][positions]


def change_colours(pixels_B3HW: Tensor, draws_BK: np.ndarray, views: Views) -> Tensor:
    """Jitter, turn grey and blur the images whose draws say so.

    Args:
        pixels_B3HW: 0 to 1; not written to.
        draws_BK: float64 [B, VIEW_UNIFORMS] in [0, 1), the columns named in this module.

    Returns:
        [B, 3, H, W], 0 to 1.

    Source: torchvision's ColorJitter, RandomGrayscale, and Pillow's GaussianBlur as the published scripts call it.
    Differs: no rounding to 8 bits between steps; the blur is the Gaussian that Pillow approaches by three box blurs.
    """
    pixels = pixels_B3HW.clone()
    for rows, step in (
        (draws_BK[:, JITTERED] < views.jitter, _jitter),
        (draws_BK[:, GREYED] < views.grey, _grey),
        (draws_BK[:, BLURRED] < views.blur, _blur),
    ):
        if rows.any():
            chosen = to_device(np.flatnonzero(rows), pixels.device)
            pixels[chosen] = step(pixels[chosen], draws_BK[rows], views)
    return pixels


def normalise(pixels_B3HW: Tensor, config: DatasetConfig) -> Tensor:
    """Return pixels of 0 to 1, normalised as the network takes them."""
    # Rounded to float32 whatever the pixels' type.
    mean, std = (per_channel(values, pixels_B3HW.device, torch.float32) for values in (config.mean, config.std))
    return (pixels_B3HW - mean.to(pixels_B3HW.dtype)) / std.to(pixels_B3HW.dtype)


def _jitter(pixels_B3HW: Tensor, draws_BK: np.ndarray, views: Views) -> Tensor:
    """Apply the four changes in four rounds, in an order drawn per image."""
    strengths = np.array([views.brightness, views.contrast, views.saturation])
    factors_B3 = 1 + (2 * draws_BK[:, [BRIGHTNESS, CONTRAST, SATURATION]] - 1) * strengths
    turn_B = (2 * draws_BK[:, HUE] - 1) * views.hue
    order_B4 = ORDERS[(draws_BK[:, ORDER] * len(ORDERS)).astype(np.int64)]
    pixels = pixels_B3HW
    for turn in range(4):
        for operation in range(4):
            chosen = np.flatnonzero(order_B4[:, turn] == operation)
            if not len(chosen):
                continue
            rows = to_device(chosen, pixels.device)
            values = turn_B[chosen] if operation == 3 else factors_B3[chosen, operation]
            amount = to_device(values, pixels.device, pixels.dtype)[:, None, None, None]
            pixels[rows] = _change(pixels[rows], operation, amount)
    return pixels


def _change(pixels: Tensor, operation: int, amount_B111: Tensor) -> Tensor:
    """Blend with black, with the mean grey or with the grey image; or turn the hue."""
    if operation == 3:
        return turn_hue(pixels, amount_B111)
    if operation == 0:
        return (amount_B111 * pixels).clamp(0, 1)
    grey = _grey_B1HW(pixels)
    reference = grey.mean((1, 2, 3), keepdim=True) if operation == 1 else grey
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


def _grey_B1HW(pixels_B3HW: Tensor) -> Tensor:
    red, green, blue = pixels_B3HW.split(1, dim=1)
    return GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue


def _grey(pixels_B3HW: Tensor, draws_BK: np.ndarray, views: Views) -> Tensor:
    del draws_BK, views
    return _grey_B1HW(pixels_B3HW).expand_as(pixels_B3HW)


def _blur(pixels_B3HW: Tensor, draws_BK: np.ndarray, views: Views) -> Tensor:
    """Blur with a Gaussian of a standard deviation drawn per image; border pixels are repeated outwards."""
    low, high = views.blur_sigma
    sigma_B = low + (high - low) * draws_BK[:, SIGMA]
    reach = min(math.ceil(3 * high), *pixels_B3HW.shape[-2:])  # 3 standard deviations hold 99.7 % of a Gaussian
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


def _read_on_threads(store: FileImages, positions: np.ndarray, crops_BK: np.ndarray) -> Tensor:
    """Decode files on one thread per CPU: a pass reads two views of every image, so decoding takes most of its time."""
    pieces = [rows for rows in np.array_split(np.arange(len(positions)), usable_cpus()) if len(rows)]
    if len(pieces) < 2:
        return store.read(positions, crops_BK)
    with ThreadPoolExecutor(len(pieces)) as threads:
        return torch.cat(list(threads.map(lambda rows: store.read(positions[rows], crops_BK[rows]), pieces)))
