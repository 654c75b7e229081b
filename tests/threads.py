"""Workers of a mesh in threads of this process, which exchange for real on the CPU: a world in no time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from orchestration.training.exchange import Alone, Group, Groups
from orchestration.training.mesh import Mesh, MeshShape

LIMIT_S = 60.0


class ThreadGroup:
    """A group of some of the threads. It sums in the order of ranks, so all have the same bits.

    Attributes:
        made: its exchanges, in words, with the bytes that this worker gave.
    """

    handle = None

    def __init__(self, rank: int, given: list[Any], barrier: threading.Barrier) -> None:
        self.size, self.rank = len(given), rank
        self._given, self._barrier = given, barrier
        self.made: list[tuple[str, int]] = []

    def all_gather(self, own: Tensor, what: str) -> list[Tensor]:
        self.made.append((what, own.nbytes))
        self._given[self.rank] = own.detach().clone()
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found

    def all_reduce(self, values: Tensor, what: str) -> None:
        found = self.all_gather(values, what)
        total = found[0].clone()
        for other in found[1:]:
            total += other
        values.detach().copy_(total)

    def broadcast(self, values: Tensor, what: str) -> None:
        values.copy_(self.all_gather(values, what)[0])


def run_mesh(shape: MeshShape, work: Callable[[Mesh, threading.Lock], Any]) -> list[Any]:
    """Return what `work(mesh, lock)` returns on every worker of a mesh, by rank.

    Args:
        shape: of the mesh.
        work: holds the lock while it draws new weights, from torch's one generator.
    """
    barriers: list[threading.Barrier] = []

    def groups_of(parts: list[list[int]]) -> dict[int, Group]:
        found: dict[int, Group] = {}
        for ranks in parts:
            if len(ranks) == 1:
                found[ranks[0]] = Alone()
                continue
            barriers.append(threading.Barrier(len(ranks), timeout=LIMIT_S))
            given: list[Any] = [None] * len(ranks)
            found |= {rank: ThreadGroup(place, given, barriers[-1]) for place, rank in enumerate(ranks)}
        return found

    slots, replicas = range(shape.slots), range(shape.replicas)
    data = groups_of([[s * shape.replicas + d for d in replicas] for s in slots])
    experts = groups_of([[s * shape.replicas + d for s in slots] for d in replicas])
    everyone = groups_of([list(range(shape.workers))])
    results: list[Any] = [None] * shape.workers
    problems: list[BaseException] = []
    lock = threading.Lock()

    def one(rank: int) -> None:
        try:
            groups = Groups(data[rank], experts[rank], everyone[rank])
            results[rank] = work(Mesh(shape, rank, groups=groups), lock)
        except BaseException as problem:  # raised again below
            problems.append(problem)
            for barrier in barriers:
                barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(shape.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise next((p for p in problems if not isinstance(p, threading.BrokenBarrierError)), problems[0])
    return results
