"""Augmentation on the device against torchvision's functional transforms, image by image."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from experts.augmentation.color_jitter import ORDERS
from experts.augmentation.stack import SHARED, Stack, prepare_eval
from experts.data.config import Augment, ColorJitter, DatasetConfig
from experts.data.decode import CROP_ATTEMPTS, frame, resized_crop_boxes
from experts.data.keyed_random import uniforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def config(**steps):
    return DatasetConfig(name="test", source="cifar10", mean=MEAN, std=STD, augment=Augment(**steps))


def augment(batch, draws, config):
    return Stack.of(config)(batch, {"pixels": draws})


def images(count, channels=3, size=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8))


def as_torchvision(image, draws, padding, flip, degrees):
    """The published order: crop, flip, rotate, to tensor, normalise."""
    if padding:
        top, left = (int(d * (2 * padding + 1)) for d in draws[:2])
        image = F.crop(F.pad(image, padding), top, left, *image.shape[-2:])
    if draws[2] < flip:
        image = F.hflip(image)
    if degrees:
        image = F.rotate(image, (2 * draws[3] - 1) * degrees)
    return F.normalize(F.convert_image_dtype(image, torch.float32), MEAN, STD)


@pytest.mark.parametrize("size", [31, 32])
def test_crop_and_flip_are_exact(size):
    batch, draws = images(64, size=size), uniforms(3, 0, 64, len(SHARED))
    ours = augment(batch, draws, config(crop_padding=4, horizontal_flip=0.5))
    theirs = [as_torchvision(i, d, 4, 0.5, 0) for i, d in zip(batch, draws, strict=True)]
    assert torch.equal(ours, torch.stack(theirs))
    assert 20 < sum(draws[:, 2] < 0.5) < 44, "both kinds occur"


def test_rotation_takes_the_same_pixels():
    """Nearest pixel, black corners. torchvision computes positions in float32, we in float64: a position within 1e-5 of
    the middle between two pixels may fall to the other one, so 1 pixel in 1000 may differ."""
    batch, draws = images(64), uniforms(4, 0, 64, len(SHARED))
    ours = augment(batch, draws, config(crop_padding=4, horizontal_flip=0.5, rotation=15))
    theirs = torch.stack([as_torchvision(i, d, 4, 0.5, 15) for i, d in zip(batch, draws, strict=True)])
    assert (ours != theirs).float().mean() < 1e-3


def test_jitter_follows_torchvisions_formulas():
    batch, draws = images(32), uniforms(5, 0, 32, len(SHARED))
    chosen = config(color_jitter=ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2))
    ours = augment(batch, draws, chosen)
    for image, row, mine in zip(batch, draws, ours, strict=True):
        steps = [
            (F.adjust_brightness, 0.4, row[4]),
            (F.adjust_contrast, 0.3, row[5]),
            (F.adjust_saturation, 0.2, row[6]),
        ]
        expected = F.convert_image_dtype(image, torch.float32)
        for turn in ORDERS[int(row[7] * 6)]:
            adjust, strength, draw = steps[turn]
            expected = adjust(expected, 1 + (2 * draw - 1) * strength)
        # 1e-6 on the scale of pixels; normalising divides by 0.2
        torch.testing.assert_close(mine, F.normalize(expected, MEAN, STD), atol=5e-6, rtol=0)


@pytest.mark.parametrize("size", [15, 16])
def test_cutout_blackens_what_the_published_code_does(size):
    """Centre drawn over the whole image; size // 2 pixels either way, clipped; black before normalisation."""
    batch, draws = images(64), uniforms(9, 0, 64, 2)
    chosen = DatasetConfig(
        name="test", source="cifar10", mean=MEAN, std=STD, augment=[{"name": "cutout", "size": size}]
    )
    ours = Stack.of(chosen)(batch, {"cutout": draws})
    for image, (row, column), mine in zip(batch, draws, ours, strict=True):
        y, x = int(row * 32), int(column * 32)
        mask = torch.ones(32, 32)
        mask[max(y - size // 2, 0) : y + size // 2, max(x - size // 2, 0) : x + size // 2] = 0
        expected = F.normalize(F.convert_image_dtype(image, torch.float32) * mask, MEAN, STD)
        assert torch.equal(mine, expected)


def test_grey_images_are_repeated_onto_three_channels():
    batch, draws = images(8, channels=1), uniforms(6, 0, 8, len(SHARED))
    chosen = config(crop_padding=4, horizontal_flip=0.5, rotation=15)
    assert torch.equal(augment(batch, draws, chosen), augment(batch.expand(-1, 3, -1, -1), draws, chosen))


def test_evaluation_only_scales_and_normalises():
    batch = images(4)
    expected = F.normalize(batch.float() / 255, MEAN, STD)
    assert torch.equal(prepare_eval(batch, config(crop_padding=4, rotation=15)), expected)
    assert prepare_eval(batch, config(), torch.float64).dtype == torch.float64


def test_inputs_are_not_written_to():
    batch = images(4)
    kept = batch.clone()
    augment(batch, uniforms(0, 0, 4, len(SHARED)), config(color_jitter=ColorJitter(brightness=0.4)))
    augment(batch, uniforms(0, 0, 4, len(SHARED)), config())
    assert torch.equal(batch, kept)


@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"crop_padding": 4},
        {"rotation": 15, "color_jitter": ColorJitter(contrast=0.4)},
    ],
)
def test_an_empty_batch_gives_no_rows(steps):
    empty = augment(images(0), uniforms(0, 0, 0, len(SHARED)), config(**steps))
    assert empty.shape == (0, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_images():
    batch, draws = images(64), uniforms(7, 0, 64, len(SHARED))
    chosen = config(crop_padding=4, horizontal_flip=0.5, rotation=15)
    there = augment(batch.cuda(), draws, chosen).cpu()
    torch.testing.assert_close(there, augment(batch, draws, chosen), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (30, 400)])
def test_random_crops_are_distributed_as_torchvisions(height, width):
    """Mean area and mean left edge of 2000 crops by each, equal within 5 standard errors of the difference."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image, scale = torch.empty(1, height, width), (0.08, 1.0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(2000)])
    draws = uniforms(8, 0, 2000, 2 * CROP_ATTEMPTS + 2)
    ours = resized_crop_boxes(height, width, scale, draws)
    for a, b in ((ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]), (ours[:, 1], theirs[:, 1])):
        assert abs(a.mean() - b.mean()) <= 5 * np.hypot(a.std(), b.std()) / np.sqrt(2000)
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    assert (ours[:, 2:] > 0).all()


def test_evaluation_frames_are_torchvisions_resize_and_centre_crop():
    """Same rule for sizes, same filter. Ours works on bytes throughout, so a value may round to the next one."""
    picture = images(1, size=97)[:, :, :60]
    expected = F.center_crop(F.resize(picture, 40, antialias=True), [32, 32])
    assert (frame(picture, 32, 40).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "factor", "top", "left"),
    [
        (28, 28, 1, 2, 2),
        (8, 8, 4, 0, 0),
        (16, 10, 2, 0, 6),
        (17, 9, 1, 7, 11),
        (32, 32, 1, 0, 0),
    ],
)
def test_small_images_are_enlarged_by_a_whole_factor_and_centred(height, width, factor, top, left):
    white = torch.full((1, 1, height, width), 255, dtype=torch.uint8)
    framed = frame(white, 32)[0, 0]
    expected = torch.zeros(32, 32, dtype=torch.uint8)
    expected[top : top + factor * height, left : left + factor * width] = 255
    assert torch.equal(framed, expected)


def test_large_images_are_resized_to_the_short_side_and_cropped():
    assert frame(images(2, size=100)[:, :, :60], 32).shape == (2, 3, 32, 32)
    wide = torch.zeros(1, 3, 40, 200, dtype=torch.uint8)
    wide[..., 80:120] = 255
    assert (frame(wide, 32)[..., 2:30] == 255).all()
