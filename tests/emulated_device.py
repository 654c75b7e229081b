"""A device that keeps a GPU's manners and computes on the CPU, for tests without a GPU.

    with EmulatedDevice() as seen:
        trainer = StageTrainer(config, stage, dataset, Mesh(shape, device=DEVICE))
        trainer.train(1)
    assert seen.waits == {}

Numbers are the CPU's to the last bit. A GPU's refusals are refusals here: tensors of both kinds in one operation,
`numpy()` of a tensor on the device, operations without a CUDA kernel for their type. Where the host would have to wait
for the device is counted: `item`, `tolist`, copies either way, masks as indices, constants made from Python numbers.

The device is called "meta", since torch refuses names it does not know. Its CUDA graphs are in emulated_graphs.py. Not
emulated: autocast, inference mode, streams, and the rounding of CUDA's own kernels.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "meta"
_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_SIZED_BY_VALUES = {_aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default}
_NO_UINT8_KERNEL = {_aten._upsample_bilinear2d_aa.default, _aten._upsample_bicubic2d_aa.default}
_UNFILLED = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_make_tensor, _enter_autocast = torch.tensor, torch.autocast


class RefusedByDevice(RuntimeError):
    """A GPU would refuse this operation."""


@dataclass
class Seen:
    """A record of what the device was asked for.

    Attributes:
        waits: of the host for the device, by kind and by the line of the project that asked.
        launches: operations on the device, by name; without views, and without memory that is taken and not filled.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def wait(self, kind: str) -> None:
        """Count one wait.

        Raises:
            RefusedByDevice: a graph is being captured, as CUDA does by cudaErrorStreamCaptureUnsupported.
        """
        if _capture.recorder is not None:
            raise RefusedByDevice(f"operation not permitted when stream is capturing: {kind}")
        frame = sys._getframe(1)
        while (file := frame.f_code.co_filename) == __file__ or "/site-packages/" in file:
            assert frame.f_back is not None, "no line of the project asked"
            frame = frame.f_back
        self.waits[kind, f"{file}:{frame.f_lineno}"] += 1


_active = [Seen()]  # the innermost context is last


class Recorder(Protocol):
    """A graph that is being captured."""

    def record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the results of an operation, which have no numbers yet. Tensors are given as the CPU has them."""
        ...


class _Capture(threading.local):
    """The graph that this thread captures."""

    recorder: Recorder | None = None


_capture = _Capture()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Have a recorder note the operations of this thread instead of carrying them out."""
    _capture.recorder = recorder
    try:
        yield
    finally:
        _capture.recorder = None


class OnDevice(Tensor):
    """A tensor of the device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        with torch._C._DisableTorchDispatch():
            shell = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device=DEVICE)
        tensor = Tensor._make_subclass(cls, shell, False)
        tensor.inner = inner
        return tensor

    def __repr__(self) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        """Refuse, as a GPU's tensor does."""
        raise RefusedByDevice("a tensor of the device has no numpy(); needed .cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        """Return the numbers; a wait."""
        _active[-1].wait("tolist")
        return self.inner.detach().tolist()

    def __deepcopy__(self, memo: Any) -> OnDevice:
        return OnDevice(self.inner.detach().clone()).requires_grad_(self.requires_grad)


class _Dispatch(TorchDispatchMode):
    """Sends what a thread asks for to the emulated device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})


class EmulatedDevice(_Dispatch):
    """While this lasts, DEVICE is the emulated device. Outside of it nothing is changed."""

    def __init__(self) -> None:
        super().__init__()
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Seen:
        _active.append(Seen())
        for owner, name, value in (
            (torch, "tensor", _tensor), (Tensor, "new_tensor", _new_tensor), (torch, "autocast", _autocast),
            (torch, "inference_mode", torch.no_grad),  # in which views do not ask the class of a tensor
            (nn.Module, "_apply", _apply), (nn.Module, "_load_from_state_dict", _load),
        ):  # fmt: skip
            self._patches.enter_context(patch.object(owner, name, value))
        super().__enter__()
        return _active[-1]

    @classmethod
    def in_thread(cls) -> TorchDispatchMode:
        """Return a context for a thread that is started while the device is emulated in the one that starts it."""
        return _Dispatch()

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._patches.close()
        _active.pop()


@dataclass(frozen=True)
class _Traits:
    """The facts of an operation that its schema holds.

    Attributes:
        looks: it makes a view, or takes memory without filling it.
        mutable: it writes to arguments.
        returns_written: (position, name) of the arguments that it writes to and returns.
        indexes, sized: see _INDEXING, _SIZED_BY_VALUES.
        takes_numbers: a number in a tensor of its own may lie anywhere.
    """

    looks: bool
    mutable: bool
    returns_written: tuple[tuple[int, str], ...]
    indexes: bool
    sized: bool
    takes_numbers: bool


@cache
def _traits(func: Any) -> _Traits:
    schema = func._schema
    written = [
        (i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    returns = any(r.alias_info is not None and r.alias_info.is_write for r in schema.returns)
    return _Traits(
        looks=func.is_view or func.overloadpacket in _UNFILLED,
        mutable=schema.is_mutable,
        returns_written=tuple(written) if returns else (),
        indexes=func in _INDEXING,
        sized=func in _SIZED_BY_VALUES,
        takes_numbers=torch.Tag.pointwise in func.tags,
    )


def _carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the CPU; its results lie on the device if its inputs do or it says so."""
    tensors = tensors_of(args)
    if kwargs:
        tensors += tensors_of(kwargs)
    on_device = any(map(_is_on_device, tensors))
    to_device = on_device
    if (asked := kwargs.get("device")) is not None:
        to_device = torch.device(asked).type == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if not on_device and not to_device:
        return func(*args, **kwargs)

    if func is _aten._to_copy.default:
        return _copied(args[0], kwargs, to_device)
    if func is _aten.copy_.default:
        return _copied_to(*args, **kwargs)
    if on_device:
        _refuse_or_count(func, args, tensors)
    if not to_device or func is _aten._local_scalar_dense.default:
        return func(*changed(args, _inner), **changed(kwargs, _inner))
    return _written(func, args, kwargs, _launched(func, args, kwargs))


def _launched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return an operation's results as the CPU has them: computed and counted, or recorded."""
    if _capture.recorder is not None:
        # A number from the host becomes an argument of the kernel: it stays what it is now.
        args, kwargs = changed((args, kwargs), lambda x: _inner(x) if isinstance(x, OnDevice) else x.clone())
        return _capture.recorder.record(func, args, kwargs)
    args, kwargs = changed(args, _inner), changed(kwargs, _inner)
    found = func(*args, **kwargs)
    if not only_looks(func, (args, kwargs), found):
        launched(str(func))
    return found


def launched(name: str) -> None:
    """Count a launch."""
    _active[-1].launches[name] += 1


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors among an operation's arguments or results, in a fraction of the time of torch's own trees."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return an operation's arguments or results with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([changed(item, change) for item in value])
    if isinstance(value, dict):
        return {name: changed(item, change) for name, item in value.items()}
    return value


def only_looks(func: Any, given: Any, found: Any) -> bool:
    """Return whether an operation launches nothing: it makes a view, or takes memory without filling it.

    Args:
        given: its arguments, as the CPU has them.
        found: its results, as the CPU has them.
    """
    traits = _traits(func)
    if traits.looks or traits.mutable:
        return traits.looks
    storages = {value.untyped_storage()._cdata for value in tensors_of(given)}
    made = tensors_of(found)
    return bool(made) and all(value.untyped_storage()._cdata in storages for value in made)


def _refuse_or_count(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise RefusedByDevice where a GPU would refuse, and count the waits that a GPU would cause."""
    traits = _traits(func)
    for value in tensors:
        if type(value) is OnDevice:
            if func in _NO_UINT8_KERNEL and value.dtype == torch.uint8:
                raise RefusedByDevice(f"{func} has no CUDA kernel for {value.dtype}")
        elif traits.indexes and value is not args[0]:
            _active[-1].wait("index on the host")
        elif value.ndim or not traits.takes_numbers:
            raise RefusedByDevice(f"{func}: tensors of the device and of the host, {tuple(value.shape)}")
    if func is _aten._local_scalar_dense.default:
        _active[-1].wait("item")
    masks = traits.indexes and any(index is not None and index.dtype == torch.bool for index in args[1])
    if masks or traits.sized:
        _active[-1].wait("size from values")


def _copied(source: Tensor, kwargs: dict[str, Any], to_device: bool) -> Tensor:
    func = _aten._to_copy.default
    if isinstance(source, OnDevice) and to_device:
        return OnDevice(_launched(func, (source,), kwargs))
    crosses = isinstance(source, OnDevice) or to_device
    if crosses and (_capture.recorder is not None or not kwargs.get("non_blocking")):
        _active[-1].wait("to the device" if to_device else "to the host")
    values = func(_inner(source), **kwargs)
    return OnDevice(values) if to_device else values


def _copied_to(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    func = _aten.copy_.default
    if isinstance(target, OnDevice) and isinstance(source, OnDevice):
        _launched(func, (target, source), {})
        return target
    crosses = isinstance(target, OnDevice) or isinstance(source, OnDevice)
    if crosses and (_capture.recorder is not None or not non_blocking):
        _active[-1].wait("copy_")
    func(_inner(target), _inner(source))
    return target


def _written(func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> Any:
    """Put results on the device; of an operation in place, return the tensor that it wrote to instead of a new one."""
    arguments = _traits(func).returns_written
    if not arguments:
        return changed(found, OnDevice)
    written = [args[i] if i < len(args) else kwargs[name] for i, name in arguments if i < len(args) or name in kwargs]
    return written[0] if len(func._schema.returns) == 1 else tuple(written)


def _is_on_device(value: Any) -> bool:
    return type(value) is OnDevice


def _inner(value: Any) -> Any:
    return value.inner if type(value) is OnDevice else value


# Functions of torch that would look at the device's name or at the class of a tensor, and miss what it stands for.


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **rest: Any) -> Tensor:
    values = _make_tensor(data, dtype=dtype, **rest)
    if device is None or torch.device(device).type != DEVICE:
        return values
    _active[-1].wait("torch.tensor on the device")
    return OnDevice(values)


def _new_tensor(self: Tensor, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    return _tensor(data, dtype=dtype or self.dtype, device=self.device if device is None else device)


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    return contextlib.nullcontext() if device_type == DEVICE else _enter_autocast(device_type, *args, **kwargs)


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """Do as `nn.Module._apply`, with new parameters: a parameter cannot become one of another class."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for name, weight in self._parameters.items():
            if weight is not None and (moved := fn(weight)) is not weight:
                self._parameters[name] = nn.Parameter(moved.detach(), weight.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _load(self: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Do as `nn.Module._load_from_state_dict`, which takes a meta tensor for one that holds nothing."""
    with torch.no_grad():
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            if own is not None and prefix + name in state:
                own.copy_(state[prefix + name])
