"""Costs one can do by hand."""

from __future__ import annotations

import torch

from experts.backbones.cost import multiply_adds
from experts.backbones.resnet_cifar import ResNetCifar
from experts.ensemble import build_ensemble
from experts.heads import CosineHead


def test_multiply_adds_of_resnet32():
    """Output positions x kernel x channels in x out:

    conv1 1024 * 9 * 3 * 16 = 442,368; stage 1: 10 * 1024 * 9 * 16 * 16 = 23,592,960; stage 2: 256 * 9 * (16 * 32 +
    9 * 32 * 32) = 22,413,312; stage 3: 64 * 9 * (32 * 64 + 9 * 64 * 64) = 22,413,312; head 64 * 100 = 6,400.
    """
    net = build_ensemble(
        ResNetCifar.Config(),
        CosineHead.Config(),
        num_classes=100,
        expert_names=["a", "b"],
        reduce_dimension=False,
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
