"""Resizing by integers gives torch's pixels of a CPU, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from experts.augmentation.resized_crop import random_resized_crops
from experts.data.decode import CROP_UNIFORMS, resize, resized_crop_boxes
from experts.data.resampling import enlarge, resample, tap_table

DRAWS = np.random.default_rng(0)


def picture(*shape):
    return torch.from_numpy(DRAWS.integers(0, 256, shape, dtype=np.uint8))


def by_torch(images, height, width):
    return interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=True)


@pytest.mark.parametrize("seed", range(8))
def test_whole_images_of_any_size(seed):
    """Much smaller, much larger, and one side each way; 1 and 3 channels."""
    draws = np.random.default_rng(seed)
    for _ in range(50):
        height, width, new_height, new_width = draws.integers(1, 90, 4).tolist()
        images = picture(2, int(draws.choice([1, 3])), height, width)
        found = resample(images, np.array([[0, 0, height, width]]), new_height, new_width)
        assert torch.equal(found, by_torch(images, new_height, new_width)), (height, width, new_height, new_width)


@pytest.mark.parametrize(("size", "new"), [(32, 224), (500, 224), (1000, 32), (3, 3), (1, 7), (257, 256)])
def test_sizes_of_real_data(size, new):
    images = picture(1, 3, size, size)
    assert torch.equal(resample(images, np.array([[0, 0, size, size]]), new, new), by_torch(images, new, new))


def test_black_and_white_stay_so():
    """Weights sum to a power of two only about; the clip takes what is beyond."""
    for value in (0, 255):
        images = torch.full((1, 1, 40, 40), value, dtype=torch.uint8)
        assert (resample(images, np.array([[0, 0, 40, 40]]), 17, 61) == value).all()


def test_every_image_has_a_crop_of_its_own():
    images = picture(64, 3, 32, 32)
    uniforms = DRAWS.random((64, CROP_UNIFORMS))
    boxes = resized_crop_boxes(32, 32, (0.08, 1.0), uniforms)
    found = resample(images, boxes, 32, 32)
    assert torch.equal(found, random_resized_crops(images, uniforms, (0.08, 1.0)))
    assert len({tuple(box) for box in boxes.tolist()}) > 60


def test_no_images_give_none():
    assert resample(picture(0, 3, 8, 8), np.empty((0, 4), np.int64), 5, 6).shape == (0, 3, 5, 6)


def test_weights_of_an_axis_that_is_halved():
    """Input pixels 0 .. 3 give 2: the first is centred at 1 and reaches from -1 to 3, with shares 3, 3, 1 of 7."""
    first, weights, bits = tap_table(np.array([4]), 2)
    assert first.tolist() == [[0, 1]]
    assert (weights[0, 0] / 2 ** bits[0])[:3] == pytest.approx([3 / 7, 3 / 7, 1 / 7], abs=1e-4)
    assert 2**14 <= weights.max() < 2**15


@pytest.mark.parametrize("size", [8, 31, 32, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_products_of_matrices_give_torchs_pixels(size, channels):
    """Every width and height of a crop, black and white among the pixels."""
    images = picture(64, channels, size, size)
    images[::7] = 255
    sides = DRAWS.integers(1, size + 1, (64, 2))
    sides[0], sides[1] = 1, size
    boxes = np.hstack([(DRAWS.random((64, 2)) * (size - sides + 1)).astype(np.int64), sides])
    expected = [
        resize(image[:, top : top + h, left : left + w], size, size)
        for image, (top, left, h, w) in zip(images, boxes.tolist(), strict=True)
    ]
    assert torch.equal(enlarge(images, boxes), torch.stack(expected))
    assert enlarge(images[:0], boxes[:0]).shape == (0, channels, size, size)
