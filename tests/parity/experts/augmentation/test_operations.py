"""RandAugment, AutoAugment and their operations against torchvision's, on bytes, image by image.

Operations on values are equal. Affine ones are taken from the same pixels but for those halfway between two: places are
computed in float32 there and in float64 here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import autoaugment as theirs
from torchvision.transforms.functional import InterpolationMode

from experts.augmentation.autoaugment import CIFAR10, AutoAugment
from experts.augmentation.operations import AFFINE, MAGNITUDES, SIGNED, apply
from experts.augmentation.randaugment import LIST, STRONGEST, RandAugment
from experts.data.keyed_random import uniforms

NAMES = {
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY",
    "autocontrast": "AutoContrast",
}  # fmt: skip
HALFWAY = 0.01  # share of pixels that may come from the other of two


def pictures(count, channels=3, size=32, seed=0):
    """Noise, smooth pictures, and channels of one or two values."""
    draws = np.random.default_rng(seed)
    values = draws.integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    smooth = np.add.outer(np.arange(size) * 3, np.arange(size) * 2)
    values[1::4] = smooth + draws.integers(0, 60, (len(values[1::4]), channels, 1, 1))
    values[2::4, 0], values[3::4, -1] = 77, np.where(values[3::4, -1] > 128, 200, 40)
    return torch.from_numpy(values)


def applied(image, name, magnitude):
    name = NAMES.get(name, name.capitalize())
    return theirs._apply_op(image, name, magnitude, interpolation=InterpolationMode.NEAREST, fill=None)


def assert_alike(found, expected, names):
    different = (found != expected).flatten(1).float().mean(dim=1)
    exact = [not set(one) & set(AFFINE) for one in names]
    assert not different[exact].any()
    assert not len(different) or different.mean() < HALFWAY


@pytest.mark.parametrize("size", [31, 32])
@pytest.mark.parametrize("name", MAGNITUDES)
def test_an_operation_is_torchvisions_at_every_magnitude(name, size):
    magnitudes = MAGNITUDES[name](STRONGEST + 1, size)
    if name in SIGNED:
        magnitudes = np.concatenate([magnitudes, -magnitudes])
    images = pictures(len(magnitudes), size=size)
    found = apply(images, np.full(len(images), name), magnitudes)
    expected = [applied(image, name, m) for image, m in zip(images, magnitudes.tolist(), strict=True)]
    assert_alike(found, torch.stack(expected), [[name]] * len(images))


@pytest.mark.parametrize("name", MAGNITUDES)
def test_one_channel_is_changed_as_three_equal_ones(name):
    magnitudes = MAGNITUDES[name](31, 32)
    grey, names = pictures(31, channels=1), np.full(31, name)
    found, three = apply(grey, names, magnitudes), apply(grey.expand(-1, 3, -1, -1), names, magnitudes)
    # Three channels are mixed by weights of 0.9999 in all, and cut off.
    assert (found.int() - three.int()).abs().max() <= (1 if name in ("color", "contrast") else 0)


@pytest.mark.parametrize(("bins", "space"), [(31, theirs.RandAugment()), (10, theirs.AutoAugment())])
@pytest.mark.parametrize("size", [32, 224])
def test_magnitudes_are_torchvisions(bins, space, size):
    for name, (magnitudes, signed) in space._augmentation_space(bins, (size, size)).items():
        ours = {NAMES.get(known, known.capitalize()): known for known in MAGNITUDES}[name]
        np.testing.assert_allclose(MAGNITUDES[ours](bins, size) * np.ones(bins), magnitudes.numpy(), rtol=1e-6)
        assert signed == (ours in SIGNED)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_randaugment_applies_the_operations_that_its_draws_say(magnitude):
    images, piece = pictures(64), RandAugment(RandAugment.Config(operations=3, magnitude=magnitude))
    draws = uniforms(1, 0, 64, len(piece.columns))
    kept, expected, names = images.clone(), [], []
    for picture, row in zip(images, draws, strict=True):
        image = picture
        names.append([LIST[int(row[2 * turn] * 14)] for turn in range(3)])
        for turn, name in enumerate(names[-1]):
            sign = -1 if name in SIGNED and row[2 * turn + 1] < 0.5 else 1
            image = applied(image, name, sign * float(MAGNITUDES[name](31, 32)[magnitude]))
        expected.append(image)
    assert_alike(piece(images, draws), torch.stack(expected), names)
    assert torch.equal(images, kept), "the images were written to"
    assert {name for row in names for name in row} == set(LIST)


def test_the_policy_is_torchvisions():
    policies = theirs.AutoAugment(theirs.AutoAugmentPolicy.CIFAR10).policies
    ours = [[(NAMES.get(n, n.capitalize()), p, at) for n, p, at in pair] for pair in CIFAR10]
    assert ours == [[(name, p, at or 0) for name, p, at in pair] for pair in policies]


def test_autoaugment_applies_the_pair_that_its_draws_say():
    images, piece = pictures(100), AutoAugment(AutoAugment.Config())
    draws, expected, names = uniforms(2, 0, 100, 5), [], []
    for picture, row in zip(images, draws, strict=True):
        image = picture
        names.append([])
        for turn, (name, probability, at) in enumerate(CIFAR10[int(row[0] * 25)]):
            if row[1 + 2 * turn] < probability:
                sign = -1 if name in SIGNED and row[2 + 2 * turn] < 0.5 else 1
                image = applied(image, name, sign * float(MAGNITUDES[name](10, 32)[at]))
                names[-1].append(name)
        expected.append(image)
    assert_alike(piece(images, draws), torch.stack(expected), names)
