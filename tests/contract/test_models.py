"""Every registered model with every registered head makes a sound ensemble, at every number of experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import experts
from experts import registry
from experts.ensemble import Ensemble, Expert, build_ensemble

registry.import_pieces(experts)

NAMES = [f"expert{k}" for k in range(8)]
# The cheapest settings of a model; a new one is tested at its defaults.
TINY = {"resnet_cifar": {"depth": 8}}
every_model = pytest.mark.parametrize("model", registry.names("model"))
every_head = pytest.mark.parametrize("head", registry.names("head"))


def tiny(model, head, *, num_experts=3, seed=7, only=None, reduce_dimension=True) -> Ensemble:
    return build_ensemble(
        registry.piece("model", model).Config(**TINY.get(model, {})),
        registry.piece("head", head).Config(),
        num_classes=5,
        expert_names=NAMES[:num_experts],
        reduce_dimension=reduce_dimension,
        seed=seed,
        only=only,
    )


def images(height=12, width=12, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_pieces_of_the_main_job_are_registered():
    assert "resnet_cifar" in registry.names("model")
    assert {"linear", "cosine"} <= set(registry.names("head"))


@every_model
@every_head
@pytest.mark.parametrize("num_experts", range(1, 9))
def test_logits_have_an_axis_for_the_experts_whatever_their_number(model, head, num_experts):
    net = tiny(model, head, num_experts=num_experts)
    assert net.names == tuple(NAMES[:num_experts])
    logits_EBC = net(images())
    assert logits_EBC.shape == (num_experts, 2, 5)
    assert torch.isfinite(logits_EBC).all()


@every_model
@every_head
@pytest.mark.parametrize("size", [(32, 32), (28, 28), (9, 13), (8, 17)])
@pytest.mark.parametrize("reduce_dimension", [True, False])
def test_any_image_size_works(model, head, size, reduce_dimension):
    net = tiny(model, head, num_experts=1, reduce_dimension=reduce_dimension)
    assert net(images(*size)).shape == (1, 2, 5)


@every_model
@every_head
def test_features_and_head_of_an_expert_can_be_used_apart(model, head):
    net = tiny(model, head).eval()
    h = net.trunk(images())
    for k, expert in enumerate(net.experts.values()):
        features_BD = expert.features(h)
        assert features_BD.ndim == 2
        assert torch.equal(expert.head(features_BD), net(images())[k])


@every_model
@every_head
def test_initial_weights_of_an_expert_do_not_depend_on_the_others(model, head):
    whole, part = tiny(model, head), tiny(model, head, only=["expert2", "expert1"])
    assert part.names == ("expert1", "expert2")  # the order of the ensemble, not of the request
    assert same_weights(part.trunk, whole.trunk)
    for name in part.names:
        assert same_weights(part.experts[name], whole.experts[name])
    assert same_weights(tiny(model, head, num_experts=5).experts["expert2"], whole.experts["expert2"])


@every_model
@every_head
def test_experts_and_seeds_start_from_different_weights(model, head):
    net, other = tiny(model, head), tiny(model, head, seed=8)
    assert not same_weights(net.experts["expert0"], net.experts["expert1"])
    assert not same_weights(net.experts["expert0"], other.experts["expert0"])
    assert not same_weights(net.trunk, other.trunk)


@every_model
@every_head
def test_building_neither_reads_nor_moves_the_global_generator_or_default_type(model, head):
    torch.manual_seed(1)
    first = tiny(model, head, num_experts=1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        second = tiny(model, head, num_experts=1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(first, second)
    assert {p.dtype for p in second.parameters()} == {torch.float32}


@every_model
@every_head
def test_every_parameter_gets_a_gradient_and_inputs_stay(model, head):
    net, batch = tiny(model, head), images()
    kept = batch.clone()
    (net(batch) ** 2).sum().backward()
    assert torch.equal(batch, kept)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@every_model
@every_head
def test_state_makes_the_round_trip_expert_by_expert(model, head):
    trained, fresh = tiny(model, head, seed=1), tiny(model, head, seed=2)
    trained(images())  # moves the running statistics
    for source, target in [
        (trained.trunk, fresh.trunk),
        *((trained.experts[name], fresh.experts[name]) for name in trained.names),
    ]:
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(trained.eval()(images()), fresh.eval()(images()))


@every_model
@every_head
def test_an_expert_in_evaluation_mode_scores_each_image_by_itself(model, head):
    """Tolerance for convolutions that block their sums by batch size."""
    net = tiny(model, head).eval()
    batch = images(batch=3)
    alone = torch.cat([net(image[None]) for image in batch], dim=1)
    torch.testing.assert_close(net(batch), alone, atol=1e-4, rtol=1e-4)


@every_head
def test_no_images_give_no_scores(head):
    config = registry.piece("head", head).Config()
    scores = registry.build("head", config, 6, 4)(torch.zeros(0, 6))
    assert scores.shape == (0, 4)


@every_head
def test_features_of_zero_give_finite_scores_and_gradients(head):
    config = registry.piece("head", head).Config()
    features_BD = torch.zeros(2, 6, requires_grad=True)
    scores = registry.build("head", config, 6, 4)(features_BD)
    scores.sum().backward()
    assert torch.isfinite(scores).all()
    assert torch.isfinite(features_BD.grad).all()


def test_an_expert_is_its_head_on_its_features():
    expert = Expert(nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(2, 2, 2)
    assert torch.equal(expert(x), expert.head(x.flatten(1)))
