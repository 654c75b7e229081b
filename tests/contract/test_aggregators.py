"""Every registered aggregator turns the experts' logits into sound scores."""

from __future__ import annotations

import pytest
import torch

import aggregation
from experts import registry

registry.import_pieces(aggregation)
every_aggregator = pytest.mark.parametrize("name", registry.names("aggregator"))


def aggregator(name):
    return registry.build("aggregator", registry.piece("aggregator", name).Config())


def logits(num_experts=3, dtype=torch.float64):
    draws = torch.Generator().manual_seed(num_experts)
    return (torch.randn(num_experts, 6, 4, generator=draws, dtype=torch.float64) * 5).to(dtype)


def test_the_aggregators_of_the_main_job_are_registered():
    assert {"mean_logits", "mean_probabilities"} <= set(registry.names("aggregator"))


@every_aggregator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_are_one_row_per_image_in_at_least_float32(name, dtype):
    scores_BC = aggregator(name)(logits(dtype=dtype))
    assert scores_BC.shape == (6, 4)
    assert scores_BC.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(scores_BC).all()


@every_aggregator
def test_one_expert_keeps_its_probabilities(name):
    single = logits(num_experts=1)
    torch.testing.assert_close(aggregator(name)(single).softmax(dim=1), single[0].softmax(dim=1))


@every_aggregator
def test_experts_of_one_mind_are_believed(name):
    copies = logits(num_experts=1).expand(4, -1, -1)
    torch.testing.assert_close(aggregator(name)(copies).softmax(dim=1), copies[0].softmax(dim=1))


@every_aggregator
def test_order_of_experts_does_not_matter_and_classes_keep_their_places(name):
    z, combine = logits(), aggregator(name)
    torch.testing.assert_close(combine(z.flip(0)), combine(z), atol=1e-12, rtol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(combine(z[:, :, order]), combine(z)[:, order], atol=1e-12, rtol=1e-12)


@every_aggregator
def test_inputs_are_unchanged_and_an_empty_batch_gives_no_scores(name):
    z = logits()
    aggregator(name)(z)
    assert torch.equal(z, logits())
    assert aggregator(name)(z[:, :0]).shape == (0, 4)


@every_aggregator
def test_extreme_scores_stay_finite(name):
    z = torch.tensor([[[1e4, 0.0]], [[1e4, -1e4]]])
    assert torch.isfinite(aggregator(name)(z)).all()
