"""CUDA graphs on the emulated device, with CUDA's manners.

    graphs = EmulatedGraphs()
    with graphs.apart(), graphs.capturing():
        found = work(places)          # nothing is done: `found` has no numbers, what `places` held stays
        replay = graphs.end()
    replay()                          # the operations on the very same tensors; Python does not run again

A capture writes down operations with their tensors. What existed before keeps its numbers, and new tensors hold none:
NaN, or zero where a number could be an index. A wait of the host or a copy from it is refused. A replay fills the new
tensors, so that whoever holds one sees its new numbers.

So a number that Python computed stays that of the capture, a tensor that is not filled again keeps its numbers, and a
tensor that outlives nothing but the capture reads as what it held then: each shows as a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from orchestration.training import graphs
from tests.emulated_device import DEVICE, launched, only_looks, recording, tensors_of


class EmulatedGraphs:
    """Captures and replays as `orchestration.training.graphs.CudaGraphs` does.

    Attributes:
        pieces: the number of operations in each captured piece.
        captures: that have begun.
        replays: of pieces.
        problems: that ended captures.
    """

    def __init__(self) -> None:
        self.pieces: list[int] = []
        self.captures = self.replays = 0
        self.problems: list[Exception] = []
        self._open: _Piece | None = None
        self._recording: ExitStack | None = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """See `graphs.GraphBackend.apart`."""
        with torch.autograd.set_multithreading_enabled(False):
            yield

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """See `graphs.GraphBackend.capturing`."""
        self.captures += 1
        try:
            self.begin()
            yield
        except Exception as problem:
            self.problems.append(problem)
            raise
        finally:
            self._stop()

    def begin(self) -> None:
        """See `graphs.GraphBackend.begin`."""
        assert self._open is None, "a capture inside a capture"
        self._open = _Piece()
        self._recording = ExitStack()
        self._recording.enter_context(recording(self._open))

    def end(self) -> Callable[[], None]:
        """See `graphs.GraphBackend.end`."""
        assert self._open is not None, "no capture to end"
        piece = self._open
        self._stop()
        self.pieces.append(len(piece))

        def replay() -> None:
            self.replays += 1
            launched("graph")
            piece.replay()

        return replay

    def _stop(self) -> None:
        if self._recording is not None:
            self._recording.close()
        self._open = self._recording = None


class _Piece:
    """Operations in order, each with its tensors as the CPU has them."""

    def __init__(self) -> None:
        self._operations: list[tuple[Any, Any, dict[str, Any], list[Tensor | None]]] = []

    def __len__(self) -> int:
        return len(self._operations)

    def record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the operation's results, without numbers. See `emulated_device.Recorder`."""
        given = tensors_of((args, kwargs))
        # Not by the schema: it does not say that BatchNorm writes to its running statistics.
        before = [(value, value.clone()) for value in given] if not func.is_view else []
        found = func(*args, **kwargs)
        for value, old in before:
            if not _overlaps(value):
                value.copy_(old)
        known = {value.untyped_storage()._cdata for value in given}
        results = tensors_of(found)
        made = [None if value.untyped_storage()._cdata in known else value for value in results]
        for value in made:
            if value is not None:
                value.fill_(float("nan") if value.is_floating_point() else 0)
        if not only_looks(func, given, found):
            self._operations.append((func, args, kwargs, made))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        """Carry out the operations on the same tensors."""
        with _disable_current_modes():
            for func, args, kwargs, made in self._operations:
                found = func(*args, **kwargs)
                results = tensors_of(found)
                for place, value in zip(made, results, strict=True):
                    if place is not None:
                        place.copy_(value)


def _overlaps(value: Tensor) -> bool:
    """Return whether several elements share one number, as after `expand`; nothing writes to such a tensor."""
    return any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))


@contextmanager
def emulated_graphs() -> Iterator[list[EmulatedGraphs]]:
    """Give steps on the emulated device graphs; the list grows by what captures each stage."""
    made: list[EmulatedGraphs] = []

    def graph_backend(device: torch.device) -> EmulatedGraphs | None:
        if device.type != DEVICE:
            return None
        made.append(EmulatedGraphs())
        return made[-1]

    with patch.object(graphs, "graph_backend", graph_backend):
        yield made
