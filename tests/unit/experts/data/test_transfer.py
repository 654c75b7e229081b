"""Copies to the device: without a wait, and none where the values are there already."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.data.transfer import Constant, to_device
from tests.emulated_device import DEVICE, EmulatedDevice, OnDevice

VALUES = np.arange(12, dtype=np.float64).reshape(3, 4)


@pytest.mark.parametrize("values", [VALUES, VALUES[::-1, ::2], VALUES.T, np.array(2.5), torch.from_numpy(VALUES).T])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.int64])
def test_values_arrive_in_their_type_without_a_wait(values, dtype):
    expected = torch.as_tensor(np.ascontiguousarray(values).reshape(np.shape(values)))
    expected = expected if dtype is None else expected.to(dtype)
    assert torch.equal(to_device(values, "cpu", dtype), expected)
    with EmulatedDevice() as seen:
        there = to_device(values, DEVICE, dtype)
        assert not seen.waits
    assert isinstance(there, OnDevice)
    assert there.dtype == expected.dtype
    assert torch.equal(there.inner, expected)


def test_nothing_is_copied_on_the_cpu():
    assert to_device(VALUES, "cpu").numpy().ctypes.data == VALUES.ctypes.data
    tensor = torch.ones(3)
    assert to_device(tensor, "cpu", torch.float32) is tensor


def test_a_tensor_of_the_device_is_left_alone():
    with EmulatedDevice() as seen:
        there = torch.ones(3, device=DEVICE)
        assert to_device(there, DEVICE) is there
        assert not seen.waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_many_copies_in_the_background_unmixed():
    """The host's memory is given back while copies are under way; none may be overwritten."""
    there = [to_device(np.full(100_000, n), "cuda", torch.float32) for n in range(200)]
    assert [tensor.unique().tolist() for tensor in there] == [[float(n)] for n in range(200)]


def test_a_constant_is_copied_once_per_device_and_type():
    constant = Constant(torch.tensor([1.5, 2.5], dtype=torch.float64))
    as_float32 = constant.on("cpu", torch.float32)
    assert as_float32.tolist() == [1.5, 2.5]
    assert constant.on("cpu", torch.float32) is as_float32
    with EmulatedDevice() as seen:
        assert constant.on(DEVICE) is constant.on(torch.device(DEVICE))
    assert not seen.waits
