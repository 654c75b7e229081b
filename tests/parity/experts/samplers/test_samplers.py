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
from experts.samplers.class_balanced import ClassBalanced
from experts.samplers.draws import class_aware_draws, per_draw_cycle_draws, positions_by_class, weighted_draws
from experts.samplers.effective_number import EffectiveNumber, effective_number_weights
from experts.samplers.instance_balanced import InstanceBalanced
from experts.samplers.progressively_balanced import ProgressivelyBalanced
from experts.samplers.reversed import Reversed
from experts.samplers.square_root import SquareRoot

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
