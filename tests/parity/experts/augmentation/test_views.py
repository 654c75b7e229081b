"""Random views against torchvision's and Pillow's functions, image by image, and the keys of their draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from experts.augmentation.color_jitter import HUE_ORDERS, turn_hue
from experts.augmentation.views import (
    COLUMNS,
    VIEW_UNIFORMS,
    ViewMaker,
    Views,
    change_colours,
    default_views,
)
from experts.data.config import Augment, DatasetConfig
from experts.data.images import FileImages, ResidentImages
from experts.data.keyed_random import uniforms
from experts.data.pools import FilePool

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
JITTERED, GREYED, BLURRED, SIGMA = (COLUMNS[name][1] for name in ("jittered", "greyed", "blurred", "sigma"))
ALWAYS = {"jitter": 0.0, "grey": 0.0, "blur": 0.0}


def config(size=32, name="test", **values):
    return DatasetConfig(name=name, source="cifar10", image_size=size, mean=MEAN, std=STD, **values)


def pictures(count, channels=3, size=32, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return torch.from_numpy(values)


def store(count=40, channels=3, size=32, seed=0):
    return ResidentImages(pictures(count, channels, size, seed), np.zeros(count, np.int64))


def draws(count, seed=1):
    return uniforms(seed, 0, count, VIEW_UNIFORMS)


def maker(images=None, seed=0, **views):
    images = images or store()
    return ViewMaker(images, config(images.images.shape[-1]), Views(**views), seed=seed)


def test_hue_is_torchvisions():
    """Tolerance 1e-5 on the scale of pixels: torchvision goes through HSV in float32."""
    image = pictures(30).float() / 255
    image[0], image[1, 0], image[2, 1:] = 0.25, 1.0, 0.0  # grey, two equal maxima, pure red
    for turn in (-0.5, -0.1, 0.0, 0.03, 0.1, 0.37):
        found = turn_hue(image, torch.full((30, 1, 1, 1), turn))
        torch.testing.assert_close(found, F.adjust_hue(image, turn), atol=1e-5, rtol=0)


def test_hue_in_closed_form():
    """A third of a turn moves red to green to blue to red."""
    image = pictures(4).double() / 255
    found = turn_hue(image, torch.full((4, 1, 1, 1), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(found, image[:, [2, 0, 1]], atol=1e-12, rtol=0)


def test_jitter_follows_torchvisions_formulas():
    views = Views(**ALWAYS | {"jitter": 1.0}, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    images, rows = pictures(48).float() / 255, draws(48)
    found = change_colours(images, rows, views)
    seen = set()
    for image, row, mine in zip(images, rows, found, strict=True):
        steps = [
            lambda x, d=row[9]: F.adjust_brightness(x, 1 + (2 * d - 1) * 0.4),
            lambda x, d=row[10]: F.adjust_contrast(x, 1 + (2 * d - 1) * 0.3),
            lambda x, d=row[11]: F.adjust_saturation(x, 1 + (2 * d - 1) * 0.2),
            lambda x, d=row[12]: F.adjust_hue(x, (2 * d - 1) * 0.1),
        ]
        order = tuple(HUE_ORDERS[int(row[13] * 24)])
        seen.add(order)
        expected = image
        for operation in order:
            expected = steps[operation](expected)
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=0)
    assert len(seen) > 15


def test_grey_is_torchvisions():
    images = pictures(8).float() / 255
    found = change_colours(images, draws(8), Views(**ALWAYS | {"grey": 1.0}))
    torch.testing.assert_close(found, F.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_a_gaussian(sigma):
    """Against torchvision's away from the border, where both see the same pixels; the border is replicated."""
    views = Views(**ALWAYS | {"blur": 1.0}, blur_sigma=(sigma, sigma))
    images = pictures(3).double() / 255
    found = change_colours(images, draws(3), views)
    reach = -(-3 * sigma // 1)
    expected = F.gaussian_blur(images, [int(2 * reach + 1)] * 2, [sigma, sigma])
    torch.testing.assert_close(found[..., 6:-6, 6:-6], expected[..., 6:-6, 6:-6], atol=1e-6, rtol=0)
    flat = torch.full((1, 3, 9, 9), 0.3, dtype=torch.float64)
    torch.testing.assert_close(change_colours(flat, draws(1), views), flat, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_blur_is_near_pillows(sigma):
    """Pillow repeats a box blur, which is coarse for a small width, and rounds. On white noise, the worst case, the
    mean difference is less than a tenth of what the blur changes."""
    picture = pictures(1, size=64)[0]
    pillow = np.asarray(Image.fromarray(picture.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma)))
    views = Views(**ALWAYS | {"blur": 1.0}, blur_sigma=(sigma, sigma))
    found = change_colours(picture[None].double() / 255, draws(1), views)[0]
    expected = torch.from_numpy(pillow.copy()).permute(2, 0, 1).double() / 255
    assert (found - expected).abs().mean() < 0.1 * (found - picture / 255).abs().mean()


def test_the_width_of_the_blur_is_drawn_between_its_bounds():
    views = Views(**ALWAYS | {"blur": 1.0})
    spot = torch.zeros(200, 3, 21, 21, dtype=torch.float64)
    spot[..., 10, 10] = 1
    rows = draws(200)
    found = change_colours(spot, rows, views)[:, 0].sum(dim=1)
    place = torch.arange(21) - 10.0
    sigma = (found * place**2).sum(dim=1).sqrt().numpy()
    wide = 0.1 + 1.9 * rows[:, SIGMA]
    np.testing.assert_allclose(
        sigma[wide > 0.8], wide[wide > 0.8], rtol=0.02
    )  # a narrower Gaussian is less than a pixel wide


def test_every_step_happens_with_its_probability():
    rows = draws(4000)
    for column, probability in ((JITTERED, 0.8), (GREYED, 0.2), (BLURRED, 0.2)):
        assert abs((rows[:, column] < probability).mean() - probability) < 0.03
    images = pictures(200).float() / 255
    changed = (change_colours(images, draws(200), Views(**ALWAYS | {"grey": 0.2})) != images).flatten(1).any(1)
    assert torch.equal(changed, torch.from_numpy(draws(200)[:, GREYED] < 0.2))


def test_crop_and_mirror_are_exact():
    images = store()
    made = maker(images, **ALWAYS).make(np.arange(40), epoch=2, view=1)
    rows = maker(images)._draws(2, 1)["pixels"]
    for image, row, mine in zip(images.images, rows, made, strict=True):
        top, left = (int(d * 9) for d in row[:2])
        expected = F.crop(F.pad(image, 4), top, left, 32, 32)
        expected = F.hflip(expected) if row[2] < 0.5 else expected
        torch.testing.assert_close(mine, F.normalize(expected.float() / 255, MEAN, STD), atol=1e-6, rtol=0)


def test_a_view_depends_on_its_position_alone():
    whole = maker().make(np.arange(40), 3, 0)
    some = np.array([31, 2, 17])
    assert torch.equal(maker().make(some, 3, 0), whole[some])
    again = maker()
    again.make(some, 1, 1)
    assert torch.equal(again.make(np.arange(40), 3, 0), whole)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 4}, {"view": 1}])
def test_seed_epoch_and_view_give_other_views(other):
    plain = maker().make(np.arange(40), 3, 0)
    changed = maker(seed=other.get("seed", 0)).make(np.arange(40), other.get("epoch", 3), other.get("view", 0))
    differs = (plain != changed).flatten(1).float().mean(dim=1)
    assert (differs > 0.5).float().mean() > 0.9


def test_grey_images_are_repeated_onto_three_channels():
    grey = store(channels=1)
    same = ResidentImages(grey.images.expand(-1, 3, -1, -1), grey.labels)
    torch.testing.assert_close(maker(grey).make(np.arange(40), 1, 0), maker(same).make(np.arange(40), 1, 0))


def test_resized_crops_of_resident_images():
    images = store(size=72)
    views = Views(**ALWAYS, horizontal_flip=0, random_resized_crop=(0.2, 1.0), crop_padding=0)
    made = ViewMaker(images, config(72), views, seed=0).make(np.arange(40), 1, 0)
    assert made.shape == (40, 3, 72, 72)
    assert not torch.allclose(made[0], made[1])


def test_files_are_cropped_from_the_whole_picture(tmp_path):
    """The same keyed crops as from `FileImages.read`, however the images are divided among threads."""
    paths = []
    for index, picture in enumerate(pictures(7, size=90)):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(paths[-1])
    files = FileImages(FilePool("/", np.array([p.encode() for p in paths]), np.zeros(7, np.int64)), 72, resize=80)
    views = Views(**ALWAYS, horizontal_flip=0, random_resized_crop=(0.2, 1.0), crop_padding=0)
    made = ViewMaker(files, config(72), views, seed=0)
    crops = made._draws(1, 0)["crop"]
    expected = FileImages(files.files, 72).read(np.arange(7), [((0.2, 1.0), crops)])
    expected = F.normalize(expected.float() / 255, MEAN, STD)
    torch.testing.assert_close(made.make(np.arange(7), 1, 0), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.make(np.array([5]), 1, 0), expected[5:6], atol=1e-5, rtol=0)


def test_inputs_are_not_written_to():
    images, pixels = store(), pictures(9).float() / 255
    kept = images.images.clone(), pixels.clone()
    maker(images).make(np.arange(40), 1, 0)
    change_colours(pixels, draws(9), Views(jitter=1, grey=0.5, blur=0.5))
    assert torch.equal(images.images, kept[0])
    assert torch.equal(pixels, kept[1])


def test_an_empty_batch_gives_no_rows():
    assert maker().make(np.empty(0, np.int64), 1, 0).shape == (0, 3, 32, 32)


def test_defaults_are_those_of_the_published_scripts():
    flip = {"augment": Augment(horizontal_flip=0.5)}
    assert Views(**default_views(config(**flip))) == Views()
    assert Views() == Views(
        crop_padding=4, horizontal_flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
        grey=0.2, blur=0.2, blur_sigma=(0.1, 2.0),
    )  # fmt: skip
    large = Views(**default_views(config(224, "imagenet_lt", **flip)))
    assert large == Views(random_resized_crop=(0.2, 1.0), crop_padding=0, blur=0.5)
    assert Views(**default_views(config(224, "inat18", **flip))).random_resized_crop == (0.08, 1.0)
    assert Views(**default_views(config())).horizontal_flip == 0, "training mirrors nothing"


@pytest.mark.parametrize(
    "values",
    [
        {"random_resized_crop": (0.2, 1.0)},
        {"random_resized_crop": (0.5, 0.2), "crop_padding": 0},
        {"blur_sigma": (0.0, 1.0)},
        {"hue": 0.6},
        {"jiter": 1},
    ],
)
def test_values_that_make_no_sense_are_refused(values):
    with pytest.raises(ValueError):
        Views(**values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_views():
    here = maker().make(np.arange(40), 1, 0)
    there = ViewMaker(store(), config(), Views(), seed=0, device="cuda").make(np.arange(40), 1, 0).cpu()
    torch.testing.assert_close(there, here, atol=1e-5, rtol=0)
