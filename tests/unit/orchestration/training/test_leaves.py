"""Leaves hold what learns; modules keep names, values and gradients as if there were none."""

from __future__ import annotations

import copy

import pytest
import torch

from experts.ensemble import EnsembleConfig, build_ensemble, freeze
from experts.heads.linear import LinearHead
from orchestration.config.compose import load_config
from orchestration.training.leaves import Leaves

NAMES = ("a", "b")
FACTORS = {"lr_factors": {"b": 3.0}, "part_factors": {"heads": 0.5}}


def model_of(learning=("trunk", "features", "heads")):
    config = load_config([])
    parts = EnsembleConfig(
        config.backbone, config.method.head, num_classes=4, expert_names=NAMES, reduce_dimension=True
    )
    model = build_ensemble(parts, seed=0)
    freeze(model, learning)
    return model


def loss_of(model, images):
    return model(images).square().mean()


def test_a_part_has_a_leaf_for_each_rate_and_all_that_learns_is_in_one():
    model = model_of()
    names = [name for name, _ in model.named_parameters()]
    leaves = Leaves(model, **FACTORS)
    assert [(leaf.part, leaf.lr_factor) for leaf in leaves] == [
        ("trunk", 1.0), ("experts", 1.0), ("experts", 0.5), ("experts", 3.0), ("experts", 1.5),
    ]  # fmt: skip
    assert sorted(place.name for leaf in leaves for place in leaf.places) == sorted(names)
    heads = Leaves(model_of(["heads"]))
    assert [place.name for leaf in heads for place in leaf.places] == [n for n in names if ".head." in n]


@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_and_their_gradients_are_those_without_leaves(channels_last):
    model, images = model_of().double(), torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    plain = copy.deepcopy(model)
    leaves = Leaves(model, **FACTORS, channels_last=channels_last)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    loss_of(plain, images).backward()
    with leaves.lent() as flats:
        loss = loss_of(model, images)
    found = {}
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, flats), strict=True):
        assert gradient.is_contiguous()
        found |= leaf.by_name(gradient)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert channels_last or torch.equal(found[name], parameter.grad), name


def test_a_move_of_a_leaf_and_a_loaded_file_reach_each_other():
    model = model_of()
    leaves = Leaves(model, channels_last=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for leaf in leaves:
            leaf.flat.add_(1)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(p, before[name] + 1) for name, p in parameters.items())
    model.load_state_dict(before)
    for leaf in leaves:
        assert torch.equal(leaf.flat, leaf.gathered(before))
    assert model.trunk.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_begin_where_a_gpus_kernels_want_them_and_gaps_stay_empty():
    """Biases of 5 classes: what follows them begins 3 elements later."""
    config = load_config([])
    parts = EnsembleConfig(
        config.backbone, LinearHead.Config(), num_classes=5, expert_names=NAMES, reduce_dimension=True
    )
    model = build_ensemble(parts, seed=0)
    leaves = Leaves(model)
    (leaf,) = leaves.of("experts")
    assert all(place.start % 4 == 0 for place in leaf.places)
    held = torch.zeros(leaf.flat.numel(), dtype=torch.bool)
    for place in leaf.places:
        held[place.start : place.stop] = True
    assert (~held).sum() == 3
    with leaves.lent() as flats:
        loss = loss_of(model, torch.rand(3, 3, 16, 16))
    gradient = torch.autograd.grad(loss, flats)[leaves.all.index(leaf)]
    assert not leaf.flat[~held].any()
    assert not gradient[~held].any()
    assert gradient[held].any()


def test_every_element_of_a_leaf_has_the_name_of_its_parameter():
    leaves = Leaves(model_of())
    for leaf in leaves:
        for place in leaf.places:
            assert {leaf.name_at(place.start), leaf.name_at(place.stop - 1)} == {place.name}


def test_a_forward_pass_that_fails_leaves_no_view_behind():
    """A view would keep the graph of its step, and hide weights that are loaded later."""
    model = model_of()
    leaves = Leaves(model)

    def fail():
        assert "weight" in vars(model.trunk.conv1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), leaves.lent():
        fail()
    assert "weight" not in vars(model.trunk.conv1)
