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
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "meta"
_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_SIZED_BY_VALUES = {_aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default}
_NO_KERNEL = {(_aten._upsample_bilinear2d_aa.default, torch.uint8), (_aten._upsample_bicubic2d_aa.default, torch.uint8)}
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
        ours = [
            frame
            for frame in traceback.extract_stack()
            if "/site-packages/" not in frame.filename and not frame.filename.endswith("emulated_device.py")
        ]
        self.waits[kind, f"{ours[-1].filename}:{ours[-1].lineno}"] += 1


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


def _carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the CPU; its results lie on the device if its inputs do or it says so."""
    tensors = tensors_of((args, kwargs))
    on_device = any(isinstance(value, OnDevice) for value in tensors)
    asked = kwargs.get("device")
    to_device = on_device if asked is None else torch.device(asked).type == DEVICE
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    if func is _aten._to_copy.default:
        return _copied(args[0], kwargs, to_device)
    if func is _aten.copy_.default:
        return _copied_to(*args, **kwargs)
    if on_device:
        _refuse_or_count(func, args, tensors)
    if not to_device or func is _aten._local_scalar_dense.default:
        return func(*changed(args, _inner), **changed(kwargs, _inner))
    found = _launched(func, args, kwargs)
    return _written(func, args, kwargs, changed(found, OnDevice))


def _launched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return an operation's results as the CPU has them: computed and counted, or recorded."""
    if _capture.recorder is not None:
        # A number from the host becomes an argument of the kernel: it stays what it is now.
        args, kwargs = changed((args, kwargs), lambda x: _inner(x) if isinstance(x, OnDevice) else x.clone())
        return _capture.recorder.record(func, args, kwargs)
    args, kwargs = changed((args, kwargs), _inner)
    found = func(*args, **kwargs)
    if not only_looks(func, tensors_of((args, kwargs)), found):
        launched(str(func))
    return found


def launched(name: str) -> None:
    """Count a launch."""
    _active[-1].launches[name] += 1


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors among an operation's arguments or results, in a fraction of the time of torch's own trees."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for item in value for tensor in tensors_of(item)]


def changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return an operation's arguments or results with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: changed(item, change) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([changed(item, change) for item in value])
    return value


def only_looks(func: Any, given: list[Tensor], found: Any) -> bool:
    """Return whether an operation launches nothing: it makes a view, or takes memory without filling it.

    Args:
        given: tensors among its arguments, as the CPU has them.
        found: its results, as the CPU has them.
    """
    if func.is_view or func.overloadpacket in _UNFILLED:
        return True
    if func._schema.is_mutable:
        return False
    made = tensors_of(found)
    storages = {value.untyped_storage()._cdata for value in given}
    return bool(made) and all(value.untyped_storage()._cdata in storages for value in made)


def _refuse_or_count(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise RefusedByDevice where a GPU would refuse, and count the waits that a GPU would cause."""
    for value in tensors:
        if isinstance(value, OnDevice):
            if (func, value.dtype) in _NO_KERNEL:
                raise RefusedByDevice(f"{func} has no CUDA kernel for {value.dtype}")
        elif func in _INDEXING and value is not args[0]:
            _active[-1].wait("index on the host")
        elif value.ndim or torch.Tag.pointwise not in func.tags:  # a number in a tensor of its own may lie anywhere
            raise RefusedByDevice(f"{func}: tensors of the device and of the host, {tuple(value.shape)}")
    if func is _aten._local_scalar_dense.default:
        _active[-1].wait("item")
    masks = func in _INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
    if masks or func in _SIZED_BY_VALUES:
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
    """Return the tensor that an operation in place wrote to, instead of a new one."""
    if not any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        return found
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [(a, kwargs[a.name]) for a in func._schema.arguments[len(args) :] if a.name in kwargs]
    written = [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]
    return written[0] if len(func._schema.returns) == 1 else tuple(written)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


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
