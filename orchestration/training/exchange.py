"""The exchanges between workers: the one file of training in which something crosses a network.

A `Group` is the workers that exchange with each other. Every worker is in three of them: those that hold the same
experts (the data axis), those that see the same images (the expert axis), and all. Each exchange says in words what
crosses.

Two kinds of group behave alike. `TorchGroup` exchanges for real. `RecordingGroup` writes down what would cross and
answers for the others with zeros, so that one process can take a worker's step in a mesh of any shape: `expertail plan`
does so, and cannot miss what training makes. DeepSpeed alone exchanges behind our back, inside ZeRO.

A third kind, `CutGroup`, stands before every group of a mesh. A step on a GPU is captured as CUDA graphs (graphs.py),
and no exchange is part of one: a worker that waits for a lost one must still be found by the time limit, and gloo knows
no graphs. So the group has the graph cut there, and says which exchange to make between the two pieces.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["all-gather", "all-reduce", "broadcast"]


class Group(Protocol):
    """Some workers and this one's place among them. Each method is called by all of them, equally often.

    Attributes:
        size: number of workers.
        rank: of this worker among them.
        handle: the group as torch.distributed knows it, for DeepSpeed; None where it knows none.
    """

    size: int
    rank: int
    handle: Any

    def all_gather(self, own: Tensor, what: str) -> list[Tensor]:
        """Return everyone's tensor, by rank, without gradients. All are of one shape and type.

        Args:
            own: this worker's.
            what: crosses, in words; the same text on all workers.
        """
        ...

    def all_reduce(self, values: Tensor, what: str) -> None:
        """Sum a tensor over the workers, in place; the same bits on each of them."""
        ...

    def broadcast(self, values: Tensor, what: str) -> None:
        """Overwrite a tensor with that of the first worker."""
        ...


class Alone:
    """A group of one worker, which exchanges nothing and needs no world."""

    size = 1
    rank = 0
    handle = None

    def all_gather(self, own: Tensor, what: str) -> list[Tensor]:
        """See `Group.all_gather`."""
        return [own.detach()]

    def all_reduce(self, values: Tensor, what: str) -> None:
        """See `Group.all_reduce`."""

    def broadcast(self, values: Tensor, what: str) -> None:
        """See `Group.broadcast`."""


class TorchGroup:
    """A group of the torch world that this process has joined: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.size = dist.get_world_size(handle)
        self.rank = dist.get_rank(handle)

    def all_gather(self, own: Tensor, what: str) -> list[Tensor]:
        """See `Group.all_gather`."""
        del what
        own = own.detach().contiguous()
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        if own.numel():  # everyone's is as large; not every backend takes nothing
            dist.all_gather(everyone, own, group=self.handle)
        return everyone

    def all_reduce(self, values: Tensor, what: str) -> None:
        """See `Group.all_reduce`."""
        del what
        dist.all_reduce(values, group=self.handle)

    def broadcast(self, values: Tensor, what: str) -> None:
        """See `Group.broadcast`."""
        del what
        dist.broadcast(values, group=self.handle, group_src=0)


@dataclass(frozen=True)
class Crossing:
    """One exchange that a worker has made.

    Attributes:
        what: in words.
        kind: an all-gather gives everyone's part to everyone, an all-reduce gives everyone the sum, a broadcast gives
            everyone the first worker's part.
        among: number of workers.
        bytes: that this worker contributed.
    """

    what: str
    kind: Kind
    among: int
    bytes: int


class RecordingGroup:
    """A group in which every other worker has zeros. Nothing crosses; `record` grows by what would.

    Args:
        size, rank: as of `Group`.
        record: shared by the groups of a worker, so that it is in the order of the step.
    """

    handle = None

    def __init__(self, size: int, rank: int, record: list[Crossing]) -> None:
        self.size = size
        self.rank = rank
        self._record = record

    def all_gather(self, own: Tensor, what: str) -> list[Tensor]:
        """See `Group.all_gather`."""
        self._note("all-gather", own, what)
        blank = own.new_zeros(()).expand_as(own)  # takes no memory
        return [own.detach() if rank == self.rank else blank for rank in range(self.size)]

    def all_reduce(self, values: Tensor, what: str) -> None:
        """See `Group.all_reduce`."""
        self._note("all-reduce", values, what)

    def broadcast(self, values: Tensor, what: str) -> None:
        """See `Group.broadcast`."""
        self._note("broadcast", values, what)

    def _note(self, kind: Kind, values: Tensor, what: str) -> None:
        if values.numel():  # nothing crosses otherwise
            self._record.append(Crossing(what, kind, self.size, values.numel() * values.element_size()))


class Capture(Protocol):
    """A step that is being captured: its work is written down, and not done."""

    def cut(self, exchange: Callable[[], None]) -> None:
        """End a piece here and begin the next one. `exchange` is made between the two whenever they are replayed."""
        ...


class _UnderWay(threading.local):
    """The capture that this thread is in; tests run a worker per thread."""

    capture: Capture | None = None


_under_way = _UnderWay()


@contextmanager
def capturing(capture: Capture) -> Iterator[None]:
    """Let the exchanges of this thread cut a capture instead of being made."""
    assert _under_way.capture is None, "a capture inside a capture"
    _under_way.capture = capture
    try:
        yield
    finally:
        _under_way.capture = None


class CutGroup:
    """A group whose exchanges cut the capture that is under way; without one it passes them on.

    In a capture nothing is exchanged: the tensors hold no numbers yet. So a worker whose capture fails half-way has
    made no exchange that the others did not make, and its steps go on to fit theirs, captured or not.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.size, self.rank, self.handle = group.size, group.rank, group.handle

    def all_gather(self, own: Tensor, what: str) -> list[Tensor]:
        """See `Group.all_gather`."""
        if _under_way.capture is None:
            return self._group.all_gather(own, what)
        own = own.detach()
        # The next piece reads from these tensors at every replay, so what comes in is copied to them.
        everyone = [torch.empty(own.shape, dtype=own.dtype, device=own.device) for _ in range(self.size)]
        group = self._group

        def exchange() -> None:
            torch._foreach_copy_(everyone, group.all_gather(own, what))

        _under_way.capture.cut(exchange)
        return everyone

    def all_reduce(self, values: Tensor, what: str) -> None:
        """See `Group.all_reduce`."""
        self._in_place(self._group.all_reduce, values, what)

    def broadcast(self, values: Tensor, what: str) -> None:
        """See `Group.broadcast`."""
        self._in_place(self._group.broadcast, values, what)

    def _in_place(self, exchange: Callable[[Tensor, str], None], values: Tensor, what: str) -> None:
        if _under_way.capture is None:
            exchange(values, what)
        else:
            _under_way.capture.cut(partial(exchange, values.detach(), what))


@dataclass(frozen=True)
class Groups:
    """The groups of one worker.

    Attributes:
        data: workers that hold the same experts and see different images.
        experts: workers that see the same images and hold different experts.
        everyone: all workers of the mesh.
    """

    data: Group
    experts: Group
    everyone: Group

    def with_cuts(self) -> Groups:
        """Return the same groups, which cut a capture where they exchange."""
        return Groups(_cutting(self.data), _cutting(self.experts), _cutting(self.everyone))


def _cutting(group: Group) -> Group:
    return group if isinstance(group, Alone | CutGroup) else CutGroup(group)


NOBODY = Groups(Alone(), Alone(), Alone())
"""The groups of the only worker of a mesh."""


def join_groups(slots: int, replicas: int, rank: int, timeout_s: float) -> Groups:
    """Create the groups of a mesh in the torch world that this process has joined, and return this worker's.

    Args:
        slots, replicas: lengths of the two axes; rank r holds slot r // replicas.
        rank: of this worker in the world.
        timeout_s: seconds that an exchange may wait for another worker.
    """
    limit = timedelta(seconds=math.ceil(timeout_s))
    slot, replica = divmod(rank, replicas)
    # Torch wants every worker to create every group, in one order.
    of_slot = [dist.new_group([s * replicas + d for d in range(replicas)], timeout=limit) for s in range(slots)]
    of_replica = [dist.new_group([s * replicas + d for s in range(slots)], timeout=limit) for d in range(replicas)]
    return Groups(TorchGroup(of_slot[slot]), TorchGroup(of_replica[replica]), TorchGroup(dist.group.WORLD))


def record_groups(slots: int, replicas: int, rank: int, record: list[Crossing]) -> Groups:
    """Return the groups of one worker of a mesh that exists on paper; for the arguments see `join_groups`."""
    slot, replica = divmod(rank, replicas)
    places = ((replicas, replica), (slots, slot), (slots * replicas, rank))
    return Groups(*(RecordingGroup(size, own, record) if size > 1 else Alone() for size, own in places))
