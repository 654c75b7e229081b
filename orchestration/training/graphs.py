"""Steps replayed as CUDA graphs, which are cut where something crosses between workers.

A step of a small network is some hundred kernels of a few microseconds each: a GPU waits for the host, which launches
them one by one. A CUDA graph holds them all and is launched as a whole.

    calls 1 and 2 of a key     compute(batch)                    real steps; libraries and constants get ready
    after the second           compute(places), captured         the work is written down, and none of it is done
    later calls                places <- batch; replay           piece 1, exchange 1, piece 2, exchange 2, ...

A graph knows kernels and addresses. Python does not run again, so all that may differ between two replays of a key are
the numbers in tensors that exist beforehand: the batch's (copied to places of their own), weights and buffers of the
network, and what the host draws (`StepDraws`). Shapes of the batch are part of the key; its caller adds whatever else
the work depends on.

Why this is right, in one place, because no CPU shows it:

Memory. All pieces of all keys share one pool (after a capture that failed, later ones share another). The pool gives
memory away once its tensor is gone; a tensor that lives across a cut, as autograd's saved ones do, keeps its memory.
Replays run in the order of the capture, on one stream, so at each point the same memory means the same as it did there.
Between the pieces an exchange takes ordinary memory. Another key may be given what was free after this key's capture:
every replay writes first whatever it reads there.
Results are kept by us, so that no other key is given theirs; the next call of the key overwrites them.

Streams. `compute` always runs on one stream of ours, captured or not. Libraries keep workspaces per stream: those of
the first calls serve the capture too, and lie outside the pool. Gradients are wanted of tensors that `compute` makes
itself, `leaf.detach().requires_grad_()`: the node that autograd keeps for a leaf may be older, as where DeepSpeed has
hooked to it, and would bring the stream that it was made on into the capture.

Backward. Autograd hands a GPU's work to a thread of its own. A capture must end in the thread that began it, and an
exchange inside the backward pass ends one: so autograd stays in the calling thread.

Failure. A piece that waits for the device, or copies from the host, cannot be captured, and CUDA says so. Nothing has
been done by then, and nothing exchanged: the key's steps stay as they were, one kernel at a time, for good.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from experts.batches import Batch
from experts.draws import StepDraws
from experts.progress import Progress
from orchestration.config.run_config import EngineConfig
from orchestration.training.exchange import capturing

Computed = TypeVar("Computed")
Tree = TypeVar("Tree")

EAGER_CALLS = 2
"""Steps of a key before its capture: one in which libraries choose algorithms and pieces make their constants, one in
which all is as in the steps to come."""
MOST_KEYS = 8
"""Keys that are kept. A stage that has come to five times as many changes them too often for captures to pay."""


class GraphBackend(Protocol):
    """A way to capture work and replay it: CUDA's, or a test's."""

    def apart(self) -> AbstractContextManager[None]:
        """Compute steps inside, captured or not."""
        ...

    def capturing(self) -> AbstractContextManager[None]:
        """Begin to capture, in a place that `apart` has made. If an error ends it, drop the piece that is open."""
        ...

    def begin(self) -> None:
        """Begin a piece."""
        ...

    def end(self) -> Callable[[], None]:
        """End the piece and return what replays it."""
        ...


class StepGraphs(Generic[Computed]):
    """Computes steps: the first of a key one kernel at a time, later ones by replays of graphs.

    Args:
        compute: takes a batch and its moment to tensors in dataclasses, tuples, lists and mappings. It reads no tensors
            but the batch's, the network's and those that `draws` gives, and writes to the network's buffers at most.
        draws: of the step. It has begun whenever this is called.
        backend: captures; None where nothing is to be captured, as on a CPU.
        report: takes the reason, once, if steps cannot be captured.
    """

    def __init__(
        self,
        compute: Callable[[Batch, Progress], Computed],
        draws: StepDraws,
        backend: GraphBackend | None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._compute, self._draws, self._backend, self._report = compute, draws, backend, report
        self.forget()
        self._captures = 0
        self._reported = False

    def __call__(self, batch: Batch, now: Progress, key: Hashable = ()) -> Computed:
        """Return what `compute` returns, in tensors that the next call may overwrite.

        Args:
            key: while it and the shapes of the batch are equal, so is the work but for the numbers in tensors.
        """
        if self._backend is None:
            return self._compute(batch, now)
        key = key, *((tensor.shape, tensor.dtype) for tensor in tensors_in(batch))
        replay = self._replays.get(key)
        if replay is not None:
            return replay(batch)
        with self._backend.apart():
            found = self._compute(batch, now)
        self._calls[key] += 1
        if self._calls[key] == EAGER_CALLS and self._captures < 5 * MOST_KEYS:
            self._captures += 1
            self._capture(key, batch, now)
            if self._captures == 5 * MOST_KEYS:
                self._note(f"their kind changed {self._captures} times, too often to capture each")
        return found

    def forget(self) -> None:
        """Drop all captures, because the network's tensors have been replaced by others."""
        self._replays: dict[Hashable, _Replay[Computed]] = {}
        self._calls: Counter[Hashable] = Counter()

    def _capture(self, key: Hashable, batch: Batch, now: Progress) -> None:
        """Capture the work of the step that was just computed, or report why that cannot be."""
        assert self._backend is not None
        if len(self._replays) >= MOST_KEYS:
            oldest = next(iter(self._replays))
            del self._replays[oldest], self._calls[oldest]
        replay = _Replay[Computed](self._backend, self._draws, batch)
        try:
            with self._backend.apart():
                replay.capture(self._compute, now)
        except Exception as problem:  # whatever it is: the same code has just run, so the capture is at fault
            first_line = str(problem).strip().partition("\n")[0]
            self._note(f"{type(problem).__name__}: {first_line}")
        else:
            self._replays[key] = replay

    def _note(self, reason: str) -> None:
        if not self._reported:
            self._report(f"some steps run without CUDA graphs: {reason}")
        self._reported = True


class _Replay(Generic[Computed]):
    """The captured work of one key.

    Args:
        backend: captures.
        draws: of a step of the key, which has asked for all that it needs.
        batch: of that step.
    """

    def __init__(self, backend: GraphBackend, draws: StepDraws, batch: Batch) -> None:
        self._backend, self._draws = backend, draws
        self._held = draws.hold()
        self._places = rebuilt(batch, torch.clone)
        self._parts: list[Callable[[], None]] = []  # pieces and exchanges in turn

    def capture(self, compute: Callable[[Batch, Progress], Computed], now: Progress) -> None:
        """Write down the work of `compute`."""
        with self._draws.handing_out(self._held), self._backend.capturing(), capturing(self):
            # Without the graph of autograd, which would keep all maps of the step in memory.
            self._found = rebuilt(compute(self._places, now), torch.Tensor.detach)
            self._parts.append(self._backend.end())

    def cut(self, exchange: Callable[[], None]) -> None:
        """End a piece, and begin the next one after an exchange. See `exchange.Capture`."""
        self._parts += [self._backend.end(), exchange]
        self._backend.begin()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Computed:
        """Do the work for another batch, with the draws of the step that has begun."""
        for place, given in zip(tensors_in(self._places), tensors_in(batch), strict=True):
            place.copy_(given, non_blocking=True)
        self._draws.refill(self._held)
        for part in self._parts:
            part()
        return self._found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in dataclasses, tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def rebuilt(value: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    """Return dataclasses, tuples, lists and mappings with every tensor changed.

    Arrays become None: they are numbers of one step on the host, which no graph may have been made from.
    """
    made: Any = value
    if isinstance(value, Tensor):
        made = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        made = replace(value, **{f.name: rebuilt(getattr(value, f.name), change) for f in fields(value)})
    elif isinstance(value, dict):
        made = {name: rebuilt(item, change) for name, item in value.items()}
    elif isinstance(value, tuple | list):
        made = type(value)(rebuilt(item, change) for item in value)
    elif isinstance(value, np.ndarray):
        made = None
    return made  # type: ignore[no-any-return]


def graphs_for(config: EngineConfig, device: torch.device, *pieces: Any) -> GraphBackend | None:
    """Return what captures the steps of a stage; None where they run one kernel at a time. Decided here alone.

    Args:
        config: `engine.graphs` = false means none.
        pieces: the stage's, each saying by `capturable` whether its shapes follow from shapes alone.
    """
    if config.graphs is False or not all(piece.capturable for piece in pieces):
        return None
    return graph_backend(device)


def graph_backend(device: torch.device) -> GraphBackend | None:
    """Return what a device captures with; None for a CPU, which gains nothing."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """Captures by CUDA. See the head of the file for what it relies on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._open: torch.cuda.CUDAGraph | None = None
        self._refused: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def apart(self) -> Iterator[None]:
        """See `GraphBackend.apart`."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
            yield
        here.wait_stream(self._stream)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """See `GraphBackend.capturing`."""
        # As torch's own context does: memory that steps no longer need goes back, for the pool to take.
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        collects = gc.isenabled()
        gc.disable()  # a collector that frees a graph or an event in the middle would break the capture
        try:
            self.begin()
            yield
        finally:
            self._drop()
            if collects:
                gc.enable()

    def begin(self) -> None:
        """See `GraphBackend.begin`."""
        self._open = torch.cuda.CUDAGraph()
        # Other threads, as NCCL's or the one that writes checkpoints, may go on with what a capture forbids its own.
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        """See `GraphBackend.end`."""
        assert self._open is not None
        graph, self._open = self._open, None
        try:
            graph.capture_end()
        except Exception:
            self._leave_pool(graph)
            raise
        return graph.replay

    def _drop(self) -> None:
        """End a capture that has failed."""
        if self._open is not None:
            with suppress(RuntimeError):  # CUDA reports the first error once more
                self.end()

    def _leave_pool(self, graph: torch.cuda.CUDAGraph) -> None:
        """Take memory from elsewhere after a capture that CUDA refused to end: torch goes on allocating to its pool.

        Captures to come get a pool of their own. The graph is kept, because torch's allocator may still ask it which
        streams it captures.
        """
        with suppress(RuntimeError):  # torch did not forget
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        self._refused.append(graph)
