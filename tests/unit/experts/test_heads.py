"""The two heads by hand."""

from __future__ import annotations

import pytest
import torch

from experts.ensemble import keyed_draws
from experts.heads import CosineHead, LinearHead


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


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan")])
def test_a_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ValueError, match="scale"):
        CosineHead.Config(scale=scale)


def test_a_linear_head_has_a_scale_of_one_that_cannot_be_set():
    assert LinearHead.Config().scale == 1
    with pytest.raises(ValueError, match="scale"):
        LinearHead.Config(scale=30)
