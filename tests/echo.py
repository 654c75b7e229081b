"""One worker of a mesh on the emulated device, whose other workers hold what it holds."""

from __future__ import annotations

import pytest
from torch import Tensor

from orchestration.config.run_config import RunConfig
from orchestration.training.exchange import Alone, Groups
from orchestration.training.mesh import Mesh, MeshShape
from tests.emulated_device import DEVICE, OnDevice


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

    One replica where heads are fitted, for which an echo has too few classes.
    """
    experts = config.method.num_experts
    replicas = 2 if all(stage.epochs for stage in config.method.stages.values()) else 1
    if experts == replicas == 1:
        pytest.skip("one worker: nothing crosses")
    sizes = (replicas, experts, replicas * experts)
    groups = Groups(*(Echo(size, 0, crossed) if size > 1 else Alone() for size in sizes))
    return Mesh(MeshShape(experts, 1, replicas), device=DEVICE, groups=groups)
