"""Random views of test images, compared when weights are learnt without labels. Every draw is keyed and per image.

An image's view is a function of (seed, epoch, view, position in the test set). It depends neither on the image's batch
nor on the other images that are asked for.

The steps are crop, mirror, colour jitter, grey, blur and normalisation: the published order, except that mirroring
comes earlier. It commutes with the steps between.

Shapes: B images, S = image_size.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from experts.augmentation.color_jitter import ColorJitter
from experts.augmentation.crop import Crop
from experts.augmentation.flip import Flip
from experts.augmentation.gaussian_blur import GaussianBlur
from experts.augmentation.greyscale import Greyscale
from experts.augmentation.pixels import per_channel
from experts.augmentation.resized_crop import ResizedCrop
from experts.augmentation.stack import SHARED, Column, Stack
from experts.data.config import DatasetConfig
from experts.data.cpus import usable_cpus
from experts.data.decode import CROP_UNIFORMS
from experts.data.images import FileImages, ImageStore
from experts.data.keyed_random import key, uniforms
from experts.data.transfer import to_device
from experts.registry import Settings

Share = Annotated[float, Field(ge=0, le=1)]
SMALL_IMAGE = 64  # pixels; up to this size the default views are those of the published CIFAR script

# Columns of the uniform draws of one image, after those that training has.
_OWN = ("jittered", "brightness", "contrast", "saturation", "hue", "order", "greyed", "blurred", "sigma")
VIEW_UNIFORMS = len(SHARED) + len(_OWN)
COLUMNS: dict[str, Column] = {
    **{name: ("crop", place) for place, name in enumerate(ResizedCrop.columns)},
    **{name: ("pixels", place) for place, name in enumerate((*SHARED, *_OWN))},  # of names that come twice, the second
}


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

    def moves(self) -> list[Any]:
        """Return the pieces that move pixels."""
        flip = Flip(Flip.Config(probability=self.horizontal_flip))
        if self.random_resized_crop is None:
            return [Crop(Crop.Config(padding=self.crop_padding)), flip]
        return [ResizedCrop(ResizedCrop.Config(scale=self.random_resized_crop)), flip]

    def colours(self) -> list[Any]:
        """Return the pieces that change colours."""
        jitter = ColorJitter.Config(
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            probability=self.jitter,
        )
        blur = GaussianBlur.Config(probability=self.blur, sigma=self.blur_sigma)
        grey = Greyscale.Config(probability=self.grey)
        return [ColorJitter(jitter, with_hue=True), Greyscale(grey), GaussianBlur(blur)]

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
            store = replace(store, resize=None)
        self.store, self.views = store, views
        self.seed, self.device, self.dtype = seed, torch.device(device), dtype
        self._config = config
        self._stack = Stack((*views.moves(), *views.colours()), config.mean, config.std, COLUMNS)
        self._tables: tuple[tuple[int, int], dict[str, np.ndarray]] | None = None

    def make(self, positions: np.ndarray, epoch: int, view: int) -> Tensor:
        """Return one view of some images, normalised, [B, 3, S, S] on the device.

        Args:
            positions: in the store, int64 [B].
            epoch, view: other numbers give other views.

        Raises:
            ValueError: an image file is missing or damaged; names it.
        """
        draws = {table: rows[positions] for table, rows in self._draws(epoch, view).items()}
        scale = self.views.random_resized_crop
        if isinstance(self.store, FileImages):
            crop = None if scale is None else (scale, draws["crop"])
            images = to_device(_read_on_threads(self.store, positions, crop), self.device)
        else:
            images = to_device(self.store.take(positions), self.device)
        cropped = isinstance(self.store, FileImages)
        return normalise(self._stack.changed(images, draws, self.dtype, cropped=cropped), self._config)

    def _draws(self, epoch: int, view: int) -> dict[str, np.ndarray]:
        """Return the keyed tables of a view; those of the current one are cached from batch to batch."""
        if self._tables is None or self._tables[0] != (epoch, view):
            # A row for every image of the store, so that a draw does not depend on the images asked for with it.
            self._tables = (
                (epoch, view),
                {
                    what: uniforms(key(self.seed, "views", epoch, view, what), 0, len(self.store), width)
                    for what, width in (("crop", CROP_UNIFORMS), ("pixels", VIEW_UNIFORMS))
                },
            )
        return self._tables[1]


def change_colours(pixels_B3HW: Tensor, draws_BK: np.ndarray, views: Views) -> Tensor:
    """Jitter, turn grey and blur the images whose draws say so.

    Args:
        pixels_B3HW: 0 to 1; not written to.
        draws_BK: float64 [B, VIEW_UNIFORMS] in [0, 1), the columns named in this module.

    Returns:
        [B, 3, H, W], 0 to 1.
    """
    for piece in views.colours():
        pixels_B3HW = piece(pixels_B3HW, draws_BK[:, [COLUMNS[name][1] for name in piece.columns]])
    return pixels_B3HW


def normalise(pixels_B3HW: Tensor, config: DatasetConfig) -> Tensor:
    """Return pixels of 0 to 1, normalised as the network takes them."""
    # Rounded to float32 whatever the pixels' type.
    mean, std = (per_channel(values, pixels_B3HW.device, torch.float32) for values in (config.mean, config.std))
    return (pixels_B3HW - mean.to(pixels_B3HW.dtype)) / std.to(pixels_B3HW.dtype)


def _read_on_threads(
    store: FileImages, positions: np.ndarray, crop: tuple[tuple[float, float], np.ndarray] | None
) -> Tensor:
    """Decode files on one thread per CPU: a pass reads two views of every image, so decoding takes most of its time."""
    pieces = [rows for rows in np.array_split(np.arange(len(positions)), usable_cpus()) if len(rows)]

    def read(rows: np.ndarray) -> Tensor:
        return store.read(positions[rows], [None if crop is None else (crop[0], crop[1][rows])])

    if len(pieces) < 2:
        return read(np.arange(len(positions)))
    with ThreadPoolExecutor(len(pieces)) as threads:
        return torch.cat(list(threads.map(read, pieces)))
