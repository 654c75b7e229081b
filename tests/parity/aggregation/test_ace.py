"""ACE's aggregation against numbers computed from the formulas of the paper, for which no code was published.

Origin: three classes, the first many, the second medium, the third few; three experts for all, medium and few, few.
Tolerance: half a unit of the last printed decimal.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from aggregation.ace import Ace
from aggregation.aggregator import Outputs
from experts.class_groups import GroupRule
from experts.ensemble import Expert
from experts.heads.linear import LinearHead

COUNTS = torch.tensor([500, 50, 5])
NAMES = ("all", "medium_few", "few")
LOGITS = [
    [[2, 0.5, -1], [0.1, 0.3, 0.8], [0.4, 1.2, -0.3]],
    [[1, 1.5, 0], [-0.4, 0.2, 1.1], [0.2, 0.9, 0.6]],
    [[0.3, -0.2, 0.4], [1.2, -0.7, 0.5], [0, 0.5, -0.8]],
]
HEADS = [
    [[1, 2], [0.5, -0.5], [-1, 3]],
    [[0.2, 0.1], [2, 0], [0, 1]],
    [[0.1, 0.1], [0, 0.3], [1, 1]],
]


def expert(weight):
    head = LinearHead(LinearHead.Config(), 2, 3)
    head.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    return Expert(nn.Identity(), head)


def outputs(rule):
    norms_EC = torch.stack([rule.describe(expert(weight)) for weight in HEADS])
    return Outputs(torch.tensor(LOGITS, dtype=torch.float64), norms_EC)


def ace(**settings):
    return Ace(Ace.Config(groups=GroupRule(rule="count"), **settings), COUNTS, NAMES)


def transcription(logits_EBC, heads_ECD, targets, power):
    """zhat_i = (a_1 / a_i) z_i, a_i = mean over TC_i of ||w_i^c||^p, out_c = mean over the experts with c in TC_i."""
    z, w = np.array(logits_EBC, float), np.array(heads_ECD, float)
    a = [np.mean([np.sqrt((w[i, c] ** 2).sum()) ** power for c in classes]) for i, classes in enumerate(targets)]
    out = np.empty(z.shape[1:])
    for c in range(z.shape[2]):
        responsible = [i for i, classes in enumerate(targets) if c in classes]
        out[:, c] = sum(a[0] / a[i] * z[i, :, c] for i in responsible) / len(responsible)
    return out


def test_row_norms_and_scales():
    rule = ace()
    given = outputs(rule)
    expected = [[2.236068, 0.707107, 3.162278], [0.223607, 2, 1], [0.141421, 0.3, 1.414214]]
    np.testing.assert_allclose(given.numbers_EK, expected, atol=5e-7)
    np.testing.assert_allclose(rule.scales(given.numbers_EK), [1, 1.356767, 1.439069], atol=5e-7)
    np.testing.assert_allclose(ace(norm_power=2).scales(given.numbers_EK), [1, 2.066667, 2.583333], atol=5e-7)


def test_scores_with_plain_norms():
    rule = ace()
    expected = [[2, 1.267575, -0.141457], [0.1, 0.285677, 1.003993], [0.4, 1.210545, -0.212398]]
    np.testing.assert_allclose(rule(outputs(rule)), expected, atol=5e-7)


def test_scores_with_squared_norms():
    rule = ace(norm_power=2)
    np.testing.assert_allclose(rule(outputs(rule))[0], [2, 1.8, 0.011111], atol=5e-7)


@pytest.mark.parametrize("power", [1.0, 2.0, 1.5])
def test_scores_are_those_of_the_equation_in_float64(power):
    rule = ace(norm_power=power)
    expected = transcription(LOGITS, HEADS, [(0, 1, 2), (1, 2), (2,)], power)
    np.testing.assert_allclose(rule(outputs(rule)), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_four_experts_with_classes_in_any_order(seed):
    """Groups of equal size, head to tail: an expert answers for its group and all rarer ones."""
    draws = np.random.default_rng(seed)
    counts = draws.permutation([900, 400, 200, 90, 30, 9, 4, 1])
    logits, heads = draws.normal(size=(4, 5, 8)), draws.normal(size=(4, 8, 3))
    order = np.argsort(-counts)
    targets = [tuple(order[2 * i :]) for i in range(4)]
    rule = Ace(Ace.Config(groups=GroupRule(rule="equal")), torch.from_numpy(counts), ("a", "b", "c", "d"))
    given = Outputs(torch.from_numpy(logits), torch.from_numpy(heads).norm(dim=2))
    np.testing.assert_allclose(rule(given), transcription(logits, heads, targets, 1.0), rtol=1e-12)
