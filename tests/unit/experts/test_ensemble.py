"""Names, choice of experts and shapes of an ensemble; contract/test_models.py checks every model."""

from __future__ import annotations

import pytest
import torch

from experts.backbones.resnet_cifar import BasicBlock, ResNetCifar
from experts.ensemble import EnsembleConfig, build_ensemble, keyed_draws
from experts.heads.linear import LinearHead


def build(**changes):
    only = changes.pop("only", None)
    parts = {"num_classes": 3, "expert_names": ["a", "b"], "reduce_dimension": True} | changes
    return build_ensemble(EnsembleConfig(ResNetCifar.Config(depth=8), LinearHead.Config(), **parts), seed=0, only=only)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_names": []}, "method.num_experts"),
        ({"expert_names": ["a", "a"]}, "'a' is used twice"),
        ({"expert_names": ["a.b"]}, r"without '\.' and '/'"),
        ({"expert_names": [""]}, "expert name ''"),
        ({"expert_names": ["tade/inverse"]}, "without"),
        ({"expert_names": ["forward"]}, "torch's containers"),
        ({"expert_names": ["ensemble"]}, "other than ensemble"),
        ({"only": ["c"]}, "experts to build: 'c'; needed one or more of 'a', 'b'"),
        ({"only": []}, "experts to build: none"),
        ({"num_classes": 1}, "num_classes = 1"),
    ],
)
def test_an_ensemble_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_parameters_are_named_by_trunk_and_expert():
    names = [name for name, _ in build().named_parameters()]
    assert "trunk.conv1.weight" in names
    assert "experts.b.features.layer3.0.conv2.weight" in names
    assert "experts.b.head.bias" in names
    assert {name.split(".")[0] for name in names} == {"trunk", "experts"}


def test_keyed_draws_are_a_function_of_seed_and_key_and_survive_an_error():
    def draw(seed, key):
        with keyed_draws(seed, key):
            return torch.rand(3)

    assert torch.equal(draw(1, "a"), draw(1, "a"))
    assert not torch.equal(draw(1, "a"), draw(1, "b"))
    assert not torch.equal(draw(1, "a"), draw(2, "a"))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), keyed_draws(0, "a"):
        torch.rand(3, out=torch.empty(2, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_are_these_numbers():
    """If these numbers change, no saved run can be reproduced from its seed any more."""
    net = build()
    found = torch.cat([net.trunk.conv1.weight.flatten()[:3], net.experts["b"].head.weight.flatten()[:3]])
    expected = torch.tensor([-0.472900, -0.012762, -0.048086, -0.319011, -0.225907, -0.038911])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("in_planes", "planes"), [(16, 24), (24, 48), (16, 32), (32, 64)])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 8)])
def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides(in_planes, planes, size):
    """With zero convolutions a block is the ReLU of its shortcut: 16 -> 24 channels are 4 of zeros, x, 4 of zeros."""
    block = BasicBlock(in_planes, planes, stride=2)
    for parameter in block.parameters():
        parameter.data.zero_()
    x = torch.rand(2, in_planes, *size)
    half = (planes - in_planes) // 2
    out = block(x)
    assert torch.equal(out[:, half:-half], x[:, :, ::2, ::2])
    assert torch.count_nonzero(out[:, :half]) == torch.count_nonzero(out[:, -half:]) == 0


def test_weights_start_kaiming_normal_with_fan_in():
    """Standard deviation sqrt(2 / fan in): 3x3 over 64 channels has fan in 576, so 0.0589."""
    net = build(reduce_dimension=False, num_classes=200)
    weight = net.experts["a"].features.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.03)
    assert net.experts["a"].head.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.03)


@pytest.mark.parametrize(("depth", "blocks"), [(8, 1), (14, 2), (20, 3), (32, 5)])
def test_depth_counts_layers_with_weights(depth, blocks):
    net = build_ensemble(
        EnsembleConfig(
            ResNetCifar.Config(depth=depth),
            LinearHead.Config(),
            num_classes=3,
            expert_names=["a"],
            reduce_dimension=True,
        ),
        seed=0,
    )
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth
    assert len(net.trunk.layer1) == len(net.experts["a"].features.layer3) == blocks
