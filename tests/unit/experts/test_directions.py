"""Directions are torch's, to the last bit, with fewer operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from experts.directions import directions
from tests.emulated_device import DEVICE, EmulatedDevice

SHAPES = [((128, 64), -1), ((64, 100), 0), ((5, 3), 1), ((0, 7), -1), ((5, 20, 64), -1)]


def vectors(shape, dtype):
    """Return some vectors, among them one of zeros and some shorter than 1e-12."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    values[:1] = 0
    values[1:2] *= 1e-14
    return values


def both_ways(function, values, dim):
    leaf = values.clone().requires_grad_()
    found = function(leaf, dim=dim)
    gradient = torch.randn(*values.shape, generator=torch.Generator().manual_seed(1), dtype=values.dtype)
    found.backward(gradient.to(values.device, non_blocking=True))
    return found.detach(), leaf.grad


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_torchs(shape, dim, dtype):
    values = vectors(shape, dtype)
    for ours, torchs in zip(both_ways(directions, values, dim), both_ways(F.normalize, values, dim), strict=True):
        assert torch.equal(ours, torchs)


def test_operations_are_fewer_than_torchs():
    def launches(function):
        with EmulatedDevice():
            values = vectors((6, 4), torch.float32).to(DEVICE)
            with EmulatedDevice() as seen:
                both_ways(function, values, 1)
        return sum(seen.launches.values())

    assert launches(directions) <= launches(F.normalize) - 6
