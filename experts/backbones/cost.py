"""The cost of a forward pass, for planning."""

from __future__ import annotations

import copy
import hashlib
import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from experts.registry import Settings

_SETTING = (bool, int, float, str, tuple, list, type(None), Settings)
_COUNTED: dict[tuple[str, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
"""Results of `multiply_adds_by_shape`, by structure and input: a plan asks again for every stage and placement."""


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
    key = structure(module), shape
    if key not in _COUNTED:
        _COUNTED[key] = _count_by_shape(module, shape)
    return _COUNTED[key]


def structure(module: nn.Module) -> str:
    """Return a digest of what decides the cost of a module: its parts' classes, settings and shapes of tensors."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if isinstance(value, _SETTING)}
        tensors = itertools.chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
        shapes = [(own, tuple(tensor.shape), tensor.dtype) for own, tensor in tensors]
        digest.update(repr((name, type(part), sorted(settings.items()), part.extra_repr(), shapes)).encode())
    return digest.hexdigest()


def _count_by_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
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
