"""Training augmentation on the device: a whole batch at once, with draws of its own for every image.

Transforms that draw once per batch would crop all of its images alike. Here an image's pixels do not depend on the
batch or the replica that it is in.

Crop, flip and rotation move whole pixels, so they compose into one gather on uint8. The arithmetic on pixels (jitter,
normalisation) follows in floating point.

Shapes: B images, S = image_size.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from experts.data.config import Augment, ColorJitter, DatasetConfig
from experts.data.decode import resized_crop, resized_crop_box
from experts.data.resampling import resample
from experts.data.transfer import to_device

# Columns of the uniform draws of one image.
CROP_TOP, CROP_LEFT, FLIP, ROTATION, BRIGHTNESS, CONTRAST, SATURATION, ORDER = range(NUM_UNIFORMS := 8)

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, of red, green, blue
ORDERS = np.array(list(itertools.permutations(range(3))))  # of brightness 0, contrast 1, saturation 2


def augment(
    images_BcHW: Tensor, uniforms_BK: np.ndarray, config: DatasetConfig, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Pad and crop, flip, rotate, scale to 0..1, jitter and normalise training images.

    Args:
        images_BcHW: uint8 [B, 1 or 3, S, S], any device; not written to.
        uniforms_BK: float64 [B, NUM_UNIFORMS] in [0, 1): the columns named in this module, one row per image. A step
            that is switched off leaves its columns unused, so switching it on changes no draw of another step.
        dtype: of the result and of the arithmetic.

    Returns:
        [B, 3, S, S], contiguous, on the images' device.

    Source: the same steps as torchvision's RandomCrop, RandomHorizontalFlip, RandomRotation (nearest), ToTensor,
    ColorJitter, Normalize. Differs: no rounding to 8 bits between the steps of the jitter, as Pillow images have.
    """
    moved = _move(images_BcHW, uniforms_BK, config.augment)
    pixels = _to_unit(moved, dtype)
    if config.augment.color_jitter is not None:
        pixels = _jitter(pixels, uniforms_BK, config.augment.color_jitter)
    return _normalise(pixels, config)


def prepare_eval(images_BcHW: Tensor, config: DatasetConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale test images to 0..1, normalise them, and repeat one channel onto three.

    Args:
        images_BcHW: uint8 [B, 1 or 3, S, S].

    Returns:
        [B, 3, S, S] on the images' device.
    """
    return _normalise(_to_unit(images_BcHW, dtype), config)


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


def _move(images_BcHW: Tensor, uniforms_BK: np.ndarray, config: Augment) -> Tensor:
    """Crop from a black border, flip and rotate by one gather; uint8 to uint8."""
    if not (config.crop_padding or config.horizontal_flip or config.rotation):
        return images_BcHW
    num_images, channels, height, width = images_BcHW.shape
    device = images_BcHW.device
    offset_B2 = np.zeros((num_images, 2), dtype=np.int64)
    if config.crop_padding:
        places = 2 * config.crop_padding + 1
        offset_B2 = (uniforms_BK[:, [CROP_TOP, CROP_LEFT]] * places).astype(np.int64) - config.crop_padding
    flip_B = uniforms_BK[:, FLIP] < config.horizontal_flip

    # Read backwards: from which source pixel does output pixel (y, x) come? Rotation is the last step, so it is undone
    # first, then the flip, then the crop.
    if config.rotation:
        degrees_B = (2 * uniforms_BK[:, ROTATION] - 1) * config.rotation
        y_BHW, x_BHW = _rotated_from(degrees_B, height, width, device)
        valid_BHW = (y_BHW >= 0) & (y_BHW < height) & (x_BHW >= 0) & (x_BHW < width)
    else:
        y_BHW, x_BHW = _counted(height, device)[None, :, None], _counted(width, device)[None, None, :]
        valid_BHW = None

    # Per image, x -> a + b x undoes flip and crop together.
    sign_B = np.where(flip_B, -1, 1)
    start_B = np.where(flip_B, width - 1, 0) + offset_B2[:, 1]
    line_3B11 = to_device(np.stack([sign_B, start_B, offset_B2[:, 0]]), device)[:, :, None, None]
    x_BHW = x_BHW * line_3B11[0] + line_3B11[1]
    y_BHW = y_BHW + line_3B11[2]

    # The gather must stay inside the image, so indices are clamped; the last line blackens what was outside.
    inside_BHW = ((y_BHW >= 0) & (y_BHW < height)) & ((x_BHW >= 0) & (x_BHW < width))
    if valid_BHW is not None:
        inside_BHW &= valid_BHW
    index_BHW = y_BHW.clamp(0, height - 1) * width + x_BHW.clamp(0, width - 1)
    index_B1P = index_BHW.expand(num_images, height, width).reshape(num_images, 1, height * width)
    pixels_BcP = images_BcHW.reshape(num_images, channels, height * width)
    moved_BcP = pixels_BcP.gather(2, index_B1P.expand(-1, channels, -1))
    return moved_BcP.view(num_images, channels, height, width) * inside_BHW[:, None]


def _rotated_from(degrees_B: np.ndarray, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return source row and column of each pixel of images turned counter-clockwise, int64 [B, H, W] each.

    They may lie outside the image.
    """
    angle_B = np.deg2rad(degrees_B)
    cos_B11, sin_B11 = to_device(np.stack([np.cos(angle_B), np.sin(angle_B)]), device)[:, :, None, None]
    y_H1 = _counted(height, device, torch.float64)[:, None] - (height - 1) / 2
    x_W = _counted(width, device, torch.float64) - (width - 1) / 2
    # The products have shape [B, H, 1] and [B, 1, W]; only their sums have full size.
    x_BHW = cos_B11 * x_W - sin_B11 * y_H1
    y_BHW = sin_B11 * x_W + cos_B11 * y_H1
    return ((y_BHW + (height - 1) / 2).round_().long(), (x_BHW + (width - 1) / 2).round_().long())


def _to_unit(images_BcHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels scaled from 0..255 to 0..1, one channel repeated onto three: a new tensor [B, 3, H, W]."""
    pixels = images_BcHW.to(dtype).div_(255)
    return pixels.repeat(1, 3, 1, 1) if pixels.shape[1] == 1 else pixels


def _normalise(pixels_B3HW: Tensor, config: DatasetConfig) -> Tensor:
    mean, std = (per_channel(values, pixels_B3HW.device, pixels_B3HW.dtype) for values in (config.mean, config.std))
    # In place: `_to_unit` and `_jitter` return new tensors.
    return pixels_B3HW.sub_(mean).div_(std).contiguous()


# Constants are made once for each device and type: making one anew is a copy and two launches in every batch.


@lru_cache(maxsize=64)
def per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number for each channel, [channels, 1, 1]; shared, so not to be written to."""
    return to_device(torch.tensor(values, dtype=dtype)[:, None, None], device)


@lru_cache(maxsize=64)
def _counted(count: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.arange(count, device=device, dtype=dtype)


def _jitter(pixels_B3HW: Tensor, uniforms_BK: np.ndarray, config: ColorJitter) -> Tensor:
    """Change brightness, contrast and saturation, in an order drawn per image.

    Each of the three blends the image with a reference and clips to 0..1. The references are black, the image's mean
    grey, and the grey image. So in each of three rounds a single blend does what every image's order asks for: only
    factor and reference differ from image to image.
    """
    strengths = (config.brightness, config.contrast, config.saturation)
    columns = [BRIGHTNESS, CONTRAST, SATURATION]
    factors_B3 = 1 + (2 * uniforms_BK[:, columns] - 1) * np.array(strengths)
    order_B3 = ORDERS[(uniforms_BK[:, ORDER] * len(ORDERS)).astype(np.int64)]
    rows_B = np.arange(len(order_B3))
    for turn in range(3):
        operation_B = order_B3[:, turn]
        # One table, so that factors and masks go to the device in one transfer.
        table_3B = np.stack([factors_B3[rows_B, operation_B], operation_B == 1, operation_B == 2])
        factor, is_contrast, is_saturation = to_device(table_3B, pixels_B3HW.device, pixels_B3HW.dtype)[
            :, :, None, None, None
        ]

        red, green, blue = pixels_B3HW.unbind(1)
        grey_B1HW = (GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue)[:, None]
        mean_B111 = grey_B1HW.mean((1, 2, 3), keepdim=True)
        reference = is_saturation * grey_B1HW + is_contrast * mean_B111
        pixels_B3HW = (factor * pixels_B3HW + (1 - factor) * reference).clamp_(0, 1)
    return pixels_B3HW
