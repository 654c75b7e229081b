"""BatchNorms that count together do what torch's do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from experts.backbones.batchnorm import BatchNorm2d, counted
from tests.emulated_device import DEVICE, EmulatedDevice


def network(norm, layers=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), norm(2)) for _ in range(layers)))


def images(seed=0):
    return torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def run(net):
    """Two batches in training, one in evaluation, two with the first layer frozen; return all outputs and the state."""
    outputs = [net(images(0)), net(images(1))]
    net.eval()
    outputs.append(net(images(2)))
    net.train()
    net[0].eval()
    outputs += [net(images(3)), net(images(4))]
    sum(y.sum() for y in outputs).backward()
    return [*outputs, *net.state_dict().values(), *(p.grad for p in net.parameters())]


def test_outputs_statistics_gradients_and_counters_are_torchs():
    for ours, torchs in zip(run(counted(network(BatchNorm2d))), run(network(nn.BatchNorm2d)), strict=True):
        assert torch.equal(ours, torchs)


def test_names_are_torchs():
    assert list(counted(network(BatchNorm2d)).state_dict()) == list(network(nn.BatchNorm2d).state_dict())


def test_a_copy_counts_for_itself():
    net = counted(network(BatchNorm2d))
    other = copy.deepcopy(net)
    other(images())
    assert [int(norm.num_batches_tracked) for norm in net.norms] == [0, 0, 0]
    assert [int(norm.num_batches_tracked) for norm in other.norms] == [1, 1, 1]


def test_a_layer_of_another_class_counts_for_itself():
    net = counted(network(BatchNorm2d))
    net[1][1].__class__ = nn.BatchNorm2d
    net(images())
    assert [int(norm.num_batches_tracked) for norm in net.norms] == [1, 1, 1]


@pytest.mark.parametrize("layers", [1, 7])
def test_all_layers_are_counted_by_one_operation(layers):
    with EmulatedDevice():
        net, x = counted(network(BatchNorm2d, layers)).to(DEVICE), images().to(DEVICE)
        with EmulatedDevice() as seen:
            net(x)
    assert seen.launches["aten._foreach_add_.Scalar"] == 1
    assert seen.launches["aten.add_.Tensor"] == 0
