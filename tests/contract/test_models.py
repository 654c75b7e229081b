"""Every registered model with every registered head makes a sound ensemble, at every number of experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import experts
from experts import registry
from experts.backbones import resnet_imagenet
from experts.cases import cases_of
from experts.ensemble import Ensemble, EnsembleConfig, Expert, build_ensemble, part_of
from experts.registry import build

registry.import_pieces(experts)

NAMES = [f"expert{k}" for k in range(8)]
# The cheapest case of a model comes first, a deeper one last. Images are large enough to give BatchNorm more than two
# values per channel: it would turn two into +1 and -1, whatever the weights are.
CUTS = ["ride", "last_stage", "last_block", "whole", "branches"]
every_model = pytest.mark.parametrize("model", registry.registered_names("model"))
every_head = pytest.mark.parametrize("head", registry.registered_names("head"))
every_cut = pytest.mark.parametrize("split", CUTS)


@pytest.fixture(autouse=True)
def thin_stages(monkeypatch):
    """Give networks for big images an eighth of their channels; the parity tests build them whole."""
    monkeypatch.setattr(resnet_imagenet, "PLANES", (8, 16, 32, 64))
    monkeypatch.setattr(resnet_imagenet, "THIN_PLANES", (8, 16, 24, 48))


def tiny(
    model, head="linear", *, num_experts=3, seed=7, only=None, reduce_dimension=True, shared_head=False, **options
) -> Ensemble:
    return build_ensemble(
        EnsembleConfig(
            cases_of("model", model)[0].config.model_copy(update=options),
            cases_of("head", head)[0].config,
            num_classes=5,
            expert_names=NAMES[:num_experts],
            reduce_dimension=reduce_dimension,
            shared_head=shared_head,
        ),
        seed=seed,
        only=only,
    )


def pixels(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def images(model, batch=2):
    size = cases_of("model", model)[0].image_size
    return pixels(size, size, batch)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_pieces_of_the_recipes_are_registered():
    assert {"resnet_cifar", "resnet_imagenet"} <= set(registry.registered_names("model"))
    assert {"linear", "cosine", "tau_normalised"} <= set(registry.registered_names("head"))


@every_model
@every_head
@pytest.mark.parametrize("num_experts", range(1, 9))
def test_logits_have_an_axis_for_the_experts_whatever_their_number(model, head, num_experts):
    net = tiny(model, head, num_experts=num_experts)
    assert net.names == tuple(NAMES[:num_experts])
    logits_EBC = net(images(model))
    assert logits_EBC.shape == (num_experts, 2, 5)
    assert torch.isfinite(logits_EBC).all()


@every_model
@every_head
@pytest.mark.parametrize("size", [(32, 32), (28, 28), (9, 13), (8, 17)])
@pytest.mark.parametrize("reduce_dimension", [True, False])
def test_any_image_size_works(model, head, size, reduce_dimension):
    net = tiny(model, head, num_experts=1, reduce_dimension=reduce_dimension)
    assert net(pixels(*size)).shape == (1, 2, 5)


@every_model
@every_head
def test_features_and_head_of_an_expert_can_be_used_apart(model, head):
    net = tiny(model, head).eval()
    h = net.trunk(images(model))
    for k, expert in enumerate(net.experts.values()):
        features_BD = expert.features(h)
        assert features_BD.ndim == 2
        assert torch.equal(expert.head(features_BD), net(images(model))[k])


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
    net, batch = tiny(model, head), images(model)
    kept = batch.clone()
    (net(batch) ** 2).sum().backward()
    assert torch.equal(batch, kept)
    for name, parameter in net.named_parameters():
        if part_of(name) == "memory":  # an auxiliary trains it
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@every_model
@every_head
def test_state_makes_the_round_trip_expert_by_expert(model, head):
    trained, fresh = tiny(model, head, seed=1), tiny(model, head, seed=2)
    trained(images(model))  # moves the running statistics
    for source, target in [
        (trained.trunk, fresh.trunk),
        *((trained.experts[name], fresh.experts[name]) for name in trained.names),
    ]:
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(trained.eval()(images(model)), fresh.eval()(images(model)))


@every_model
@every_head
def test_an_expert_in_evaluation_mode_scores_each_image_by_itself(model, head):
    """Tolerance for convolutions that block their sums by batch size."""
    net = tiny(model, head).eval()
    batch = images(model, batch=3)
    alone = torch.cat([net(image[None]) for image in batch], dim=1)
    torch.testing.assert_close(net(batch), alone, atol=1e-4, rtol=1e-4)


@every_model
@every_cut
def test_every_cut_makes_an_ensemble_that_learns_everywhere(model, split):
    net = tiny(model, split=split, reduce_dimension=False)
    logits_EBC = net(images(model))
    assert logits_EBC.shape == (3, 2, 5)
    (logits_EBC**2).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@every_model
@every_cut
@pytest.mark.parametrize("size", [(32, 32), (9, 13)])
def test_every_cut_takes_any_image_size(model, split, size):
    assert tiny(model, split=split, reduce_dimension=False)(pixels(*size)).shape == (3, 2, 5)


@every_model
@every_cut
def test_weights_of_every_cut_depend_on_seed_and_name_alone(model, split):
    whole, part = (tiny(model, split=split, reduce_dimension=False, only=only) for only in (None, ["expert1"]))
    assert same_weights(part.trunk, whole.trunk)
    assert same_weights(part.experts["expert1"], whole.experts["expert1"])


@every_model
@pytest.mark.parametrize("split", ["last_stage", "last_block", "whole"])
def test_a_cut_changes_neither_the_names_of_weights_nor_what_the_network_computes(model, split):
    """One expert's trunk and features together hold the names of the whole network, each once."""
    base = tiny(model, num_experts=1, reduce_dimension=False).eval()
    net = tiny(model, num_experts=1, reduce_dimension=False, split=split, seed=1).eval()
    features = base.experts["expert0"].features
    weights = base.trunk.state_dict() | features.state_dict()
    cut = net.experts["expert0"].features
    assert sorted([*net.trunk.state_dict(), *cut.state_dict()]) == sorted(weights)
    for part in (net.trunk, cut):
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
    torch.testing.assert_close(cut(net.trunk(images(model))), features(base.trunk(images(model))))


@every_model
def test_what_experts_own_shrinks_from_cut_to_cut(model):
    """Deeper networks, so that a stage has more than one block."""
    deeper = cases_of("model", model)[-1].config.model_dump(exclude={"name"})
    order = ["whole", "ride", "last_stage", "last_block", "branches"]
    parts = [tiny(model, **deeper | {"split": split}, num_experts=1, reduce_dimension=False) for split in order]
    owned = [sum(p.numel() for p in net.experts["expert0"].features.parameters()) for net in parts]
    assert owned == sorted(set(owned), reverse=True)
    assert owned[-1] > 0
    assert not list(parts[0].trunk.parameters())


@every_model
@pytest.mark.parametrize("split", ["last_block", "branches"])
def test_thinner_stages_are_refused_where_experts_own_none(model, split):
    with pytest.raises(ValueError, match=rf"method.reduce_dimension = true .*'{split}'.* set .*= false"):
        tiny(model, split=split)


@every_model
@pytest.mark.parametrize("split", ["ride", "last_stage", "whole"])
def test_thinner_stages_are_thinner(model, split):
    thin, full = (tiny(model, split=split, reduce_dimension=flag) for flag in (True, False))
    assert thin(images(model)).shape == full(images(model)).shape
    count = {id(net): sum(p.numel() for p in net.experts["expert0"].features.parameters()) for net in (thin, full)}
    assert count[id(thin)] < count[id(full)]
    assert same_weights(thin.trunk, full.trunk)


@every_model
def test_branches_share_one_head(model):
    net = tiny(model, split="branches", reduce_dimension=False, shared_head=True)
    assert net(images(model)).shape == (3, 2, 5)
    assert not list(net.experts["expert0"].head.parameters())


def test_the_extra_layer_sets_the_number_of_features():
    config = resnet_imagenet.ResNetImageNet.Config(depth=10, split="whole", extra_layer=True)
    parts = build("model", config)
    assert parts.num_features(reduce_dimension=False) == 512
    features_BD = parts.late_stages(reduce_dimension=False)(images("resnet_imagenet"))
    assert features_BD.shape == (2, 512)
    assert features_BD.min() == 0  # ReLU


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"depth": 10, "cardinality": 32}, "cardinality = 32"),
        ({"depth": 152, "cardinality": 32}, "cardinality = 32"),
        ({"depth": 10, "extra_layer": True}, "extra_layer = true"),
        ({"depth": 18}, "depth"),
        ({"split": "middle"}, "split"),
        ({"branch_order": "relu_first"}, "branch_order"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(options, key):
    with pytest.raises(ValueError, match=key):
        resnet_imagenet.ResNetImageNet.Config(**options)


def spread(weight: torch.Tensor) -> float:
    return float(weight.detach().square().mean().sqrt())


def test_initial_convolutions_of_big_images_networks_are_as_published(monkeypatch):
    """Standard deviation sqrt(2 / (9 * 512)) = 0.02083 for 3x3 to 512; the groups do not count. Uniform: 1 / sqrt(3 *
    9 * 512) = 0.008505. A branch is a third of a convolution to 3 * 512 channels: sqrt(2 / 1536) = 0.03608."""
    monkeypatch.undo()  # full widths
    for init, expected in [("published", 0.020833), ("framework", 0.008505)]:
        parts = build("model", resnet_imagenet.ResNetImageNet.Config(depth=10, split="last_block", init=init))
        features = parts.late_stages(reduce_dimension=False)
        parts.initialise(features)
        assert spread(features.layer4[0].conv2.weight) == pytest.approx(expected, rel=0.01)
        assert spread(features.layer4[0].bn1.weight) == 1
    parts = build("model", resnet_imagenet.ResNetImageNet.Config(depth=10, split="branches"))
    branch = parts.late_stages(reduce_dimension=False)
    parts.initialise(branch)
    assert spread(branch.conv.weight) == pytest.approx(0.036084, rel=0.01)
    grouped = resnet_imagenet.Bottleneck(256, 128, 1, cardinality=32)
    parts.initialise(grouped)
    assert grouped.conv2.weight.shape == (256, 8, 3, 3)
    assert spread(grouped.conv2.weight) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


def test_a_linear_head_of_small_images_networks_starts_as_the_config_says():
    """Kaiming: sqrt(2 / 64) = 0.1768; the framework's uniform within 1 / 8: 0.125 / sqrt(3) = 0.0722."""
    for head_init, expected in [("kaiming", 0.1768), ("framework", 0.0722)]:
        net = build_ensemble(
            EnsembleConfig(
                registry.piece("model", "resnet_cifar").Config(depth=8, head_init=head_init),
                registry.piece("head", "linear").Config(),
                num_classes=500,
                expert_names=["a"],
                reduce_dimension=False,
            ),
            seed=0,
        )
        assert spread(net.experts["a"].head.weight) == pytest.approx(expected, rel=0.02)
        assert spread(net.trunk.conv1.weight) == pytest.approx((2 / 27) ** 0.5, rel=0.1)


@every_head
def test_no_images_give_no_scores(head):
    config = cases_of("head", head)[0].config
    scores = registry.build("head", config, 6, 4)(torch.zeros(0, 6))
    assert scores.shape == (0, 4)


@every_head
def test_features_of_zero_give_finite_scores_and_gradients(head):
    config = cases_of("head", head)[0].config
    features_BD = torch.zeros(2, 6, requires_grad=True)
    scores = registry.build("head", config, 6, 4)(features_BD)
    scores.sum().backward()
    assert torch.isfinite(scores).all()
    assert torch.isfinite(features_BD.grad).all()


def test_an_expert_is_its_head_on_its_features():
    expert = Expert(nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(2, 2, 2)
    assert torch.equal(expert(x), expert.head(x.flatten(1)))
