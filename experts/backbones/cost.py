"""The cost of a forward pass, for planning."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(module: nn.Module, inputs: Tensor) -> int:
    """Count multiply-adds of convolutions and matrix products in one forward pass in evaluation mode.

    A training step costs about three times as much. A copy of the module is run, so neither the mode nor the BatchNorm
    statistics of the module change.

    Args:
        module: a trunk, an expert or a whole ensemble.
        inputs: of the module; a batch of one gives the cost per image.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(module).eval()(inputs)
    return _multiply_adds(counter)


def multiply_adds_by_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Count as `multiply_adds` does, without computing anything, which is faster for large images and modules.

    Args:
        module: in evaluation mode; its weights are not read. Its forward must run on torch's meta device.
        shape: of the input.

    Returns:
        The count, and the shape of the output.
    """
    assert not module.training, "BatchNorm would record a batch"
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
    }
    dtype = next(iter(tensors.values())).dtype if tensors else torch.float32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = functional_call(module, tensors, (torch.empty(shape, dtype=dtype, device="meta"),))
    return _multiply_adds(counter), tuple(output.shape)


def _multiply_adds(counter: FlopCounterMode) -> int:
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations
