"""The cost of a forward pass, for planning."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
    with _Counter() as counter, torch.no_grad():
        copy.deepcopy(module).eval()(inputs)
    return counter.multiply_adds


def multiply_adds_by_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Count as `multiply_adds` does, without computing convolutions, which is faster for large images and modules.

    Args:
        module: in evaluation mode; its weights are not read. Its forward may depend on shapes alone.
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
        name: _zeros(tuple(tensor.shape), tensor.dtype)
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
    }
    dtype = next(iter(tensors.values())).dtype if tensors else torch.float32
    with _Counter(convolve=False) as counter, torch.no_grad():
        output = functional_call(module, tensors, (_zeros(shape, dtype),))
    return counter.multiply_adds, tuple(output.shape)


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros that take no memory. On the meta device some operations load torch's compiler."""
    return torch.zeros((), dtype=dtype).expand(list(shape))


class _Counter(TorchDispatchMode):
    """While open, counts what torch's own formulas say of each operation.

    As `torch.utils.flop_counter.FlopCounterMode` counts, which loads torch's compiler: 1.4 s of every command.

    Args:
        convolve: whether convolutions are computed. Otherwise they give zeros.
    """

    def __init__(self, *, convolve: bool = True) -> None:
        super().__init__()
        self._convolve = convolve
        self._operations = 0

    @property
    def multiply_adds(self) -> int:
        return self._operations // 2  # the formulas take a multiply-add for two operations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that no compiled code runs while this is open. Otherwise torch loads its compiler to keep it out."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:  # of an operation that is made of others, those are counted
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func is torch.ops.aten.convolution.default and not self._convolve:
            output = _zeros(_convolved(*args[:2], *args[3:]), args[0].dtype)
        else:
            output = func(*args, **kwargs)
        if formula is not None:
            self._operations += formula(*args, **kwargs, out_val=output)
        return output


def _convolved(
    inputs: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    *_: Any,
) -> list[int]:
    """Return the shape of what a convolution gives."""
    assert not transposed, "no network here has one"
    places = zip(inputs.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [len(inputs), len(weight), *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in places)]
