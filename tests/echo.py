"""Workers of a mesh on the emulated device: one whose others hold what it holds, or two that exchange for real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary
from experts.registry import piece
from orchestration.config.run_config import RunConfig
from orchestration.training.exchange import Alone, Groups
from orchestration.training.mesh import Mesh, MeshShape
from tests.emulated_device import DEVICE, EmulatedDevice, OnDevice


class Echo:
    """A group whose other workers hold what this one holds. It takes nothing from the CPU, as NCCL does not.

    Args:
        size, rank: as of `Group`.
        crossed: grows by what crosses, in words.
    """

    handle = None

    def __init__(self, size: int, rank: int, crossed: list[str]) -> None:
        self.size, self.rank, self._crossed = size, rank, crossed

    def all_gather(self, own: Tensor, what: str) -> list[Tensor]:
        return [self._look(own, what).detach()] * self.size

    def all_reduce(self, values: Tensor, what: str) -> None:
        self._look(values, what).mul_(self.size)

    def broadcast(self, values: Tensor, what: str) -> None:
        self._look(values, what)

    def _look(self, values: Tensor, what: str) -> Tensor:
        assert isinstance(values, OnDevice), f"{what}: on the CPU"
        self._crossed.append(what)
        return values


def spread(crossed: list[str], config: RunConfig) -> Mesh:
    """Return the place of the first worker of a mesh with one expert per worker and two replicas.

    One replica where heads are fitted, or auxiliaries see all images, for which an echo has too few classes.
    """
    method, experts = config.method, config.method.num_experts
    fitted = [name for name, stage in method.stages.items() if not stage.epochs or method.fits_head_first(name)]
    auxiliaries = [own for stage in method.stages.values() for own in stage.auxiliaries.values()]
    looking = [own for own in auxiliaries if piece("auxiliary", own.name).statistics is not Auxiliary.statistics]
    replicas = 1 if fitted or looking else 2
    if experts == replicas == 1:
        pytest.skip("one worker: nothing crosses")
    sizes = (replicas, experts, replicas * experts)
    groups = Groups(*(Echo(size, 0, crossed) if size > 1 else Alone() for size in sizes))
    return Mesh(MeshShape(experts, 1, replicas), device=DEVICE, groups=groups)


class Crossing:
    """Two workers in two threads, who exchange for real. They are started while the device is emulated."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.given: list[Any] = [None, None]

    def run(self, work: Callable[[int, Half], Any]) -> list[Any]:
        """Return what `work(rank, group)` returns for both."""
        found: list[Any] = [None, None]
        problems: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                with EmulatedDevice.in_thread():
                    found[rank] = work(rank, Half(self, rank))
            except BaseException as problem:  # raised again below
                problems.append(problem)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]
        return found


class Half:
    """The group of one of two workers. It sums in the order of ranks, so both have the same bits.

    Attributes:
        made: its exchanges, in words.
    """

    size, handle = 2, None

    def __init__(self, crossing: Crossing, rank: int) -> None:
        self._crossing, self.rank = crossing, rank
        self.made: list[str] = []

    def all_gather(self, own: Tensor, what: str) -> list[Tensor]:
        return self._exchange(own, what)

    def all_reduce(self, values: Tensor, what: str) -> None:
        first, second = self._exchange(values, what)
        values.copy_(first + second)

    def broadcast(self, values: Tensor, what: str) -> None:
        values.copy_(self._exchange(values, what)[0])

    def _exchange(self, own: Tensor, what: str) -> list[Tensor]:
        assert isinstance(own, OnDevice), f"{what}: on the CPU"
        self.made.append(what)
        self._crossing.given[self.rank] = own.detach().clone()
        self._crossing.barrier.wait()
        found = list(self._crossing.given)
        self._crossing.barrier.wait()
        return found
