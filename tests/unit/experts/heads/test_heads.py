"""The heads by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.ensemble import keyed_draws
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.heads.ncm import NearestClassMean
from experts.heads.tau_normalised import TauNormalisedHead


def cosine_head(scale=30.0, features=6, classes=4):
    with keyed_draws(0, "head"):
        return CosineHead(CosineHead.Config(scale=scale), features, classes)


def test_cosine_weights_start_as_unit_columns_of_layout_features_by_classes():
    weight = cosine_head(features=48, classes=100).weight
    assert weight.shape == (48, 100)
    torch.testing.assert_close(weight.norm(dim=0), torch.ones(100))
    assert (weight < 0).any()


def test_cosine_scores_ignore_lengths_and_stay_within_the_scale():
    head, x = cosine_head(scale=16), torch.randn(5, 6)
    scores = head(x)
    assert scores.abs().max() <= 16 * (1 + 1e-6)
    torch.testing.assert_close(head(100 * x), scores, atol=1e-4, rtol=1e-4)
    head.weight.data *= 7
    torch.testing.assert_close(head(x), scores, atol=1e-4, rtol=1e-4)


def test_cosine_head_is_computed_in_float32_under_autocast():
    """In bfloat16 a cosine near 1 has steps of 1/256, which the scale of 30 turns into 0.1."""
    head, x = cosine_head(), torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(x)
        linear = LinearHead(LinearHead.Config(), 6, 4)(x)
    assert scores.dtype == torch.float32
    assert linear.dtype == torch.bfloat16
    assert torch.equal(scores, head(x))


@pytest.mark.parametrize("features", ["un", "l2n", "cl2n"])
def test_nearest_class_means_are_found_and_used_in_full_precision_under_autocast(features):
    draws = torch.Generator().manual_seed(0)
    x, labels = torch.randn(9, 6, generator=draws), torch.arange(9) % 4
    heads = []
    for half in (False, True):
        head = NearestClassMean(NearestClassMean.Config(features=features), 6, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            head.fit(lambda: [(x, labels)], lambda total: total)
            heads.append((head.mean_CD, head(x)))
    assert heads[1][1].dtype == torch.float32
    assert torch.equal(heads[0][0], heads[1][0])
    assert torch.equal(heads[0][1], heads[1][1])


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan")])
def test_a_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ValueError, match="scale"):
        CosineHead.Config(scale=scale)


def test_a_linear_head_has_a_scale_of_one_that_cannot_be_set():
    assert LinearHead.Config().scale == 1
    with pytest.raises(ValueError, match="scale"):
        LinearHead.Config(scale=30)


def tau_head(gamma, weight, bias) -> TauNormalisedHead:
    head = TauNormalisedHead(TauNormalisedHead.Config(gamma=gamma), len(weight[0]), len(weight)).double()
    head.weight.data = torch.tensor(weight, dtype=torch.float64)
    head.bias.data = torch.tensor(bias, dtype=torch.float64)
    return head


def test_a_tau_normalised_head_by_hand():
    """Norms 5 and 2, x = (1, 2): training 3 + 8 + 1 = 12 and 0 + 4 - 1 = 3; evaluation with gamma 1: 11 / 5, 4 / 2."""
    head, x = tau_head(1, [[3, 4], [0, 2]], [1, -1]), torch.tensor([[1.0, 2]], dtype=torch.float64)
    assert head.train()(x).tolist() == [[12, 3]]
    torch.testing.assert_close(head.eval()(x), torch.tensor([[2.2, 2]], dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0, 0.3, 0.7, 1, 2])
def test_a_tau_normalised_head_divides_rows_by_a_power_of_their_norm(gamma):
    draws = np.random.default_rng(0)
    weight, x = draws.normal(size=(4, 3)) * [[10], [1], [0.1], [3]], draws.normal(size=(5, 3))
    expected = x @ (weight / np.linalg.norm(weight, axis=1, keepdims=True) ** gamma).T
    found = tau_head(gamma, weight.tolist(), [9.0] * 4).eval()(torch.from_numpy(x))
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-12)


def test_a_row_of_zeros_scores_zero_in_evaluation():
    head = tau_head(0.7, [[0, 0], [1, 1]], [5, 5]).eval()
    assert head(torch.tensor([[3.0, 4]], dtype=torch.float64)).tolist()[0][0] == 0


@pytest.mark.parametrize("gamma", [-0.1, float("inf"), float("nan")])
def test_gamma_must_be_a_finite_number_from_zero(gamma):
    with pytest.raises(ValueError, match="gamma"):
        TauNormalisedHead.Config(gamma=gamma)


@pytest.mark.parametrize("kind", [LinearHead, CosineHead, TauNormalisedHead])
def test_heads_that_know_no_places_are_the_same_in_every_place(kind):
    heads = []
    for position in (0, 2):
        with keyed_draws(0, "head"):
            heads.append(kind(kind.Config(), 6, 4, position))
    assert torch.equal(heads[0].weight, heads[1].weight)
