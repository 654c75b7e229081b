"""BatchNorm over replicas: numbers of one BatchNorm over the whole batch, without waits, and without copies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestration.training.batchnorm import SynchronisedBatchNorm2d
from tests.emulated_device import DEVICE, EmulatedDevice


class Twin:
    """A group of two workers, of whom the other one holds what this one holds."""

    size, rank, handle = 2, 0, None

    def all_gather(self, own, what):
        return [own.detach(), own.detach()]

    def all_reduce(self, values, what):
        values.mul_(2)


def synchronised(dtype=torch.float32, device="cpu"):
    norm = SynchronisedBatchNorm2d(5).to(device, dtype)
    norm.group, norm.of_whom = Twin(), ""
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
        norm.bias.copy_(torch.linspace(-1, 1, 5))
    return norm


def images(dtype):
    return torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def through(norm, x):
    """Return the output, the gradient of the input and those of weight and bias, for an uneven loss."""
    y = norm(x)
    slopes = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).to(y.dtype).view_as(y)
    return y, *torch.autograd.grad((y * slopes).sum(), [x, norm.weight, norm.bias])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_replicas_are_one_batch(dtype):
    norm, plain, x = synchronised(dtype), nn.BatchNorm2d(5).to(dtype), images(dtype)
    plain.load_state_dict(norm.state_dict())
    y, of_x, of_weight, of_bias = through(norm, x)
    whole = torch.cat([x, x]).detach().requires_grad_()
    expected = plain(whole)
    slopes = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(dtype).view_as(y)
    grads = torch.autograd.grad((expected * torch.cat([slopes, slopes])).sum(), [whole, plain.weight, plain.bias])
    pairs = [(y, expected[:4]), (of_x, grads[0][:4]), (2 * of_weight, grads[1]), (2 * of_bias, grads[2])]
    pairs += [(norm.running_mean, plain.running_mean), (norm.running_var, plain.running_var)]
    for found, right in pairs:
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_activations_are_kept_as_they_came(dtype):
    kept = []
    norm, x = synchronised(torch.float64 if dtype is torch.float64 else torch.float32), images(dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = norm(x)
    whole = [t for t in kept if t.ndim == 4]
    assert [t.data_ptr() for t in whole] == [x.data_ptr()]
    assert y.dtype is dtype


def test_half_types_are_computed_in_float32():
    x = images(torch.bfloat16)
    norm, exact = synchronised(), synchronised()
    in_float32 = x.detach().float().requires_grad_()
    y = norm(x)
    slopes = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16()
    of_x, of_weight = torch.autograd.grad(y, [x, norm.weight], slopes)
    right = exact(in_float32)
    grads = torch.autograd.grad(right, [in_float32, exact.weight], slopes.float())
    assert torch.equal(y, right.bfloat16())
    assert torch.equal(of_x, grads[0].bfloat16())
    assert torch.equal(of_weight, grads[1])
    assert torch.equal(norm.running_var, exact.running_var)


@pytest.mark.parametrize("num_images", [4, 0])
def test_the_host_waits_for_nothing(num_images):
    """Not for the count of its images either, which it knows."""
    with EmulatedDevice() as seen:
        norm, x = synchronised(device=DEVICE), images(torch.float32).detach().to(DEVICE)[:num_images]
        norm(torch.ones(4, 5, 3, 3, device=DEVICE))
        seen.waits.clear()
        through(norm, x.requires_grad_())
    assert seen.waits == {}
