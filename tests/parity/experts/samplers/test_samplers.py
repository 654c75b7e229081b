"""Samplers against published code: sequences from a given generator, and exact probabilities.

Origin: classifier-balancing @f162ade, RIDE @ab8be5c, GCLLoss @c2a6233, BBN, executed on CPython 3.11 with Python's and
torch's generators seeded 0; toy counts 100, 40, 10, 4. Sequences are compared exactly, probabilities to the 6 decimals
given.
"""

import random

import numpy as np
import pytest
import torch

from experts.progress import Progress
from experts.samplers.capped import Capped
from experts.samplers.class_balanced import ClassBalanced
from experts.samplers.draws import class_aware_draws, per_draw_cycle_draws, positions_by_class, weighted_draws
from experts.samplers.effective_number import EffectiveNumber, effective_number_weights
from experts.samplers.instance_balanced import InstanceBalanced
from experts.samplers.oversampled import Oversampled
from experts.samplers.progressively_balanced import ProgressivelyBalanced
from experts.samplers.reversed import Reversed
from experts.samplers.square_root import SquareRoot
from experts.samplers.undersampled import Undersampled

TOY = np.array([100, 40, 10, 4])
LABELS = np.repeat(np.arange(4), TOY)


def numbered(counts):
    """Images numbered class by class."""
    return [p.tolist() for p in positions_by_class(np.repeat(np.arange(len(counts)), counts), len(counts))]


@pytest.mark.parametrize(
    ("counts", "per_visit", "expected"),
    [
        ([4, 3, 2], 4, [3, 2, 1, 0, 7, 8, 7, 8, 4, 6, 5, 6]),
        ([5, 2, 1], 2, [4, 1, 7, 7, 5, 6, 3, 2, 5, 6, 7, 7, 6, 5, 0]),
    ],
)
def test_class_aware_cycles_match(counts, per_visit, expected):
    assert class_aware_draws(numbered(counts), per_visit, len(expected), random.Random(0)).tolist() == expected


def test_per_draw_cycles_match():
    expected = [4, 6, 5, 7, 2, 6, 0, 1, 8]
    assert per_draw_cycle_draws(numbered([4, 3, 2]), 9, random.Random(0)).tolist() == expected


def test_balanced_multinomial_matches_torch():
    """torch.multinomial uses one double per draw; from the same doubles we draw the same images. The ten recorded draws
    are numbers 11 to 20 of the seed, because the recording script drew ten before them."""
    weights = 1.0 / TOY[LABELS]
    generator = torch.Generator().manual_seed(0)
    doubles = torch.rand(20, dtype=torch.float64, generator=generator).numpy()
    ours = weighted_draws(weights, doubles).tolist()
    assert ours[10:] == [132, 70, 116, 144, 137, 130, 125, 82, 146, 150]
    generator.manual_seed(0)
    assert torch.multinomial(torch.from_numpy(weights), 20, replacement=True, generator=generator).tolist() == ours


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (InstanceBalanced, [100 / 154, 40 / 154, 10 / 154, 4 / 154]),
        (ClassBalanced, [0.25, 0.25, 0.25, 0.25]),
        (SquareRoot, [0.465401, 0.294346, 0.147173, 0.093080]),
        (EffectiveNumber, [0.250769, 0.250018, 0.249644, 0.249569]),
        (Reversed, [0.025974, 0.064935, 0.259740, 0.649351]),
    ],
)
def test_class_probabilities_match(piece, expected):
    sampler = piece(piece.Config(), LABELS, 4)
    np.testing.assert_allclose(sampler.class_probabilities(Progress(1, 5)), expected, atol=6e-7, rtol=0)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (1, [0.649351, 0.259740, 0.064935, 0.025974]),
        (2, [0.549513, 0.257305, 0.111201, 0.081981]),
        (3, [0.449675, 0.254870, 0.157468, 0.137987]),
        (4, [0.349838, 0.252435, 0.203734, 0.193994]),
        (5, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_progressively_balanced_probabilities_match(epoch, expected):
    sampler = ProgressivelyBalanced(ProgressivelyBalanced.Config(), LABELS, 4)
    np.testing.assert_allclose(sampler.class_probabilities(Progress(epoch, 5)), expected, atol=6e-7, rtol=0)


def test_effective_number_weights_match():
    expected = [0.010050, 0.025049, 0.100045, 0.250038]
    np.testing.assert_allclose(effective_number_weights(TOY, 0.9999), expected, atol=6e-7, rtol=0)


# By hand, with counts 100, 10, 1

HAND = np.array([100, 10, 1])
HAND_LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(3), HAND))


@pytest.mark.parametrize(
    ("piece", "progress", "expected"),
    [
        (InstanceBalanced, Progress(1, 1), [0.900901, 0.090090, 0.009009]),
        (SquareRoot, Progress(1, 1), [0.706101, 0.223289, 0.070610]),
        (ClassBalanced, Progress(1, 1), [0.333333, 0.333333, 0.333333]),
        # The card's l = 3/10 and 9/10; ours is (t - 1) / (T - 1).
        (ProgressivelyBalanced, Progress(4, 11), [0.730631, 0.163063, 0.106306]),
        (ProgressivelyBalanced, Progress(10, 11), [0.390090, 0.309009, 0.300901]),
        (Oversampled, Progress(1, 1), [0.333333, 0.333333, 0.333333]),
        (Undersampled, Progress(1, 1), [0.333333, 0.333333, 0.333333]),
    ],
)
def test_class_probabilities_by_hand(piece, progress, expected):
    sampler = piece(piece.Config(), HAND_LABELS, 3)
    np.testing.assert_allclose(sampler.class_probabilities(progress), expected, atol=6e-7, rtol=0)


def times(sampler, key):
    """How often each image appears in the epoch of a key."""
    return np.bincount(sampler.draw(Progress(1, 1), key), minlength=len(HAND_LABELS))


@pytest.mark.parametrize("key", range(3))
def test_over_sampling_repeats_images_1_10_and_100_times(key):
    found = times(Oversampled(Oversampled.Config(), HAND_LABELS, 3), key)
    assert np.array_equal(found, np.array([1, 10, 100])[HAND_LABELS])


def test_over_sampling_shows_images_equally_often_where_sizes_do_not_divide():
    """7 images of class 0, 3 of class 1: each of these twice, and one, which changes, once more."""
    labels = np.array([0] * 7 + [1] * 3)
    sampler = Oversampled(Oversampled.Config(), labels, 2)
    assert sampler.draws_per_epoch == 14
    epochs = [np.bincount(sampler.draw(Progress(1, 1), key), minlength=10) for key in range(20)]
    for found in epochs:
        assert found[:7].tolist() == [1] * 7
        assert sorted(found[7:]) == [2, 2, 3]
    assert {int(found.argmax()) for found in epochs} == {7, 8, 9}


def test_over_sampling_mixes_the_classes():
    """100 draws in a row hold 33 of each, within 5 standard deviations."""
    drawn = HAND_LABELS[Oversampled(Oversampled.Config(), HAND_LABELS, 3).draw(Progress(1, 1), 0)]
    for block in drawn.reshape(3, 100):
        assert abs(np.bincount(block, minlength=3) - 100 / 3).max() < 5 * np.sqrt(100 * 2 / 9)


@pytest.mark.parametrize(
    ("per_class", "expected"), [(None, [1, 1, 1]), (1, [1, 1, 1]), (10, [10, 10, 1]), (500, [100, 10, 1])]
)
def test_under_sampling_keeps_so_many_of_each_class_and_chooses_anew(per_class, expected):
    sampler = Undersampled(Undersampled.Config(per_class=per_class), HAND_LABELS, 3)
    epochs = np.array([times(sampler, key) for key in range(400)])
    assert sampler.draws_per_epoch == sum(expected)
    assert epochs.max() == 1
    for label, number in enumerate(expected):
        own = epochs[:, label == HAND_LABELS]
        assert set(own.sum(axis=1)) == {number}
        share = number / own.shape[1]
        assert abs(own.sum(axis=0) - 400 * share).max() <= 5 * np.sqrt(400 * share * (1 - share))


@pytest.mark.parametrize(("cap", "expected"), [(10, [10, 10, 1]), (None, [1, 1, 1]), (30, [30, 10, 1])])
def test_a_cap_keeps_one_subset_for_the_whole_stage(cap, expected):
    config = Capped.Config(cap=cap)
    sampler = Capped(config, HAND_LABELS, 3)
    first = times(sampler, 0)
    assert np.bincount(HAND_LABELS, weights=first).tolist() == expected
    assert first.max() == 1
    for key in (1, 2):
        assert np.array_equal(times(sampler, key), first)
        assert np.array_equal(times(Capped(config, HAND_LABELS, 3), key), first)
    assert not np.array_equal(times(Capped(Capped.Config(cap=cap, seed=1), HAND_LABELS, 3), 0), first)


def test_a_cap_must_be_given():
    with pytest.raises(ValueError, match=r"cap\s+Field required"):
        Capped.Config()
    with pytest.raises(ValueError, match="cap"):
        Capped.Config(cap=0)
