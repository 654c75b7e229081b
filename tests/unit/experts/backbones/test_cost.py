"""Costs against sums done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experts.backbones.cost import multiply_adds, multiply_adds_by_shape, structure
from experts.backbones.resnet_cifar import ResNetCifar
from experts.backbones.resnet_imagenet import ResNetImageNet
from experts.ensemble import EnsembleConfig, build_ensemble
from experts.heads.cosine import CosineHead


def test_multiply_adds_of_resnet32():
    """Output positions x kernel x channels in x out:

    conv1 1024 * 9 * 3 * 16 = 442,368; stage 1: 10 * 1024 * 9 * 16 * 16 = 23,592,960; stage 2: 256 * 9 * (16 * 32 +
    9 * 32 * 32) = 22,413,312; stage 3: 64 * 9 * (32 * 64 + 9 * 64 * 64) = 22,413,312; head 64 * 100 = 6,400.
    """
    net = build_ensemble(
        EnsembleConfig(
            ResNetCifar.Config(), CosineHead.Config(), num_classes=100, expert_names=["a", "b"], reduce_dimension=False
        ),
        seed=0,
    )
    before = {key: value.clone() for key, value in net.state_dict().items()}
    image = torch.zeros(1, 3, 32, 32)
    trunk, expert = 442_368 + 23_592_960, 2 * 22_413_312 + 6_400
    assert multiply_adds(net.trunk, image) == trunk
    assert multiply_adds(net.experts["a"], net.trunk(image)) == expert
    net.load_state_dict(before)
    assert multiply_adds(net, image) == trunk + 2 * expert
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_multiply_adds_of_resnet10_at_64_pixels():
    """Output positions x kernel x channels in x out, at 64 pixels:

    conv1 32 * 32 * 49 * 3 * 64 = 9,633,792; stage 1: 2 * 256 * 9 * 64 * 64 = 18,874,368; stage 2: 64 * (9 * 64 * 128
    + 9 * 128 * 128 + 64 * 128) = 14,680,064. The expert: stage 3: 16 * (9 * 128 * 256 + 9 * 256 * 256 + 128 * 256) =
    14,680,064; stage 4: 4 * (9 * 256 * 512 + 9 * 512 * 512 + 256 * 512) = 14,680,064.
    """
    parts = ResNetImageNet(ResNetImageNet.Config(depth=10))
    trunk, image = parts.trunk(), torch.zeros(1, 3, 64, 64)
    assert multiply_adds(trunk, image) == 9_633_792 + 18_874_368 + 14_680_064
    assert multiply_adds(parts.late_stages(reduce_dimension=False), trunk.eval()(image)) == 2 * 14_680_064


@pytest.mark.parametrize(
    "module",
    [
        ResNetCifar(ResNetCifar.Config(depth=14)).trunk(),
        ResNetImageNet(ResNetImageNet.Config(depth=50, cardinality=32)).trunk(),
        ResNetImageNet(ResNetImageNet.Config(depth=152)).trunk(),
        nn.Sequential(nn.Conv2d(3, 4, (3, 5), (2, 1), (0, 2), (1, 3)), nn.Flatten(2), nn.Linear(899, 7, bias=False)),
    ],
    ids=["resnet14", "resnext50", "resnet152", "odd"],
)
def test_multiply_adds_without_computing_are_those_of_the_libraries_counter(module):
    module, image = module.eval(), torch.zeros(1, 3, 64, 37)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = module(image)
    assert multiply_adds_by_shape(module, (1, 3, 64, 37)) == (counter.get_total_flops() // 2, tuple(output.shape))
    assert multiply_adds(module, image) == counter.get_total_flops() // 2


def test_pooling_before_a_branch_costs_one_position_instead_of_all():
    """512 * 512 per position of a 2 x 2 map; costs are counted in evaluation mode."""
    h = torch.zeros(1, 512, 2, 2)
    for order, positions in [("conv_first", 4), ("pool_first", 1)]:
        config = ResNetImageNet.Config(depth=10, split="branches", branch_order_eval=order)
        branch = ResNetImageNet(config).late_stages(reduce_dimension=False)
        assert multiply_adds(branch, h) == positions * 512 * 512


def test_modules_of_one_structure_are_counted_once_and_any_difference_counts_anew():
    """Classes, settings and shapes decide; weights do not, so a plan asks for every architecture once."""

    def branch(**settings):
        config = ResNetImageNet.Config(**{"depth": 10, "split": "branches", **settings})
        return ResNetImageNet(config).late_stages(reduce_dimension=False).eval()

    assert structure(branch()) == structure(branch())
    different = [branch(), branch(branch_order_eval="conv_first"), branch(depth=50), torch.nn.Conv2d(3, 4, 3)]
    different += [torch.nn.Conv2d(3, 4, 3, **{key: 2}) for key in ("stride", "padding", "dilation")]
    different += [torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3, groups=2), torch.nn.AvgPool2d(3)]
    assert len({structure(module) for module in different}) == len(different)
    for order in ("conv_first", "pool_first"):
        for _ in range(2):
            module, h = branch(branch_order_eval=order), torch.zeros(1, 512, 2, 2)
            assert multiply_adds_by_shape(module, tuple(h.shape))[0] == multiply_adds(module, h)


def test_a_trunk_that_passes_the_images_on_costs_nothing():
    trunk = ResNetCifar(ResNetCifar.Config(depth=8, split="whole")).trunk()
    assert multiply_adds(trunk, torch.zeros(1, 3, 32, 32)) == 0
