"""Measure workers and links on the nodes of the connected cluster. An actor on a node is a shell round gauge.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestration.cluster.sending import call, carries_anything
from orchestration.cluster.worker import keep_freed_memory
from orchestration.config.run_config import RunConfig
from orchestration.results.text import plural
from orchestration.training.mesh import MeshShape
from orchestration.training.world import Rendezvous

_START_S = 120.0  # until a node has room, has started a process and imported torch
_STEP_S = 300.0
_EXCHANGES_S = 60.0


@dataclass(frozen=True)
class Task:
    """A request to measure.

    Attributes:
        configs: of the run on each mesh.
        threads: of a worker, by mesh.
        counts_C: training images per class, by stage; of the stages that have steps.
        first: name, as `node_resources` has it, of the node whose worker takes the steps.
        partners: nodes of the workers that it exchanges with, by a name for what lies between them.
        beside: a partner that takes the same step at the same time, by mesh, where its workers share a node.
        bundle: resources of a worker.
    """

    configs: Mapping[MeshShape, RunConfig]
    threads: Mapping[MeshShape, int]
    counts_C: Mapping[str, np.ndarray]
    first: str
    partners: Mapping[str, str]
    beside: Mapping[MeshShape, str]
    bundle: Mapping[str, float]


@dataclass
class Measured:
    """Results of measuring.

    Attributes:
        compute_s: seconds that the first worker computes in a step, by mesh and stage.
        links: bytes and seconds of all-reduces between two workers, by the name of the partner.
        problems: why something is missing.
    """

    compute_s: dict[MeshShape, dict[str, float]] = field(default_factory=dict)
    links: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@ray.remote(max_restarts=0)
@carries_anything
class SpeedGauge:
    """Measures in a process of its own, as a worker would compute."""

    def __init__(self, gpu: bool) -> None:
        self._device = "cuda" if gpu else "cpu"
        self._rendezvous: Rendezvous | None = None

    def load(self) -> None:
        """Import what measuring needs."""
        keep_freed_memory()  # before torch allocates, as in a worker
        import orchestration.preflight.gauge  # noqa: F401  (imported for its time)

    def time_step(self, config: RunConfig, stage: str, counts_C: np.ndarray, threads: int) -> float:
        """See `gauge.time_step`."""
        import torch

        from orchestration.preflight.gauge import time_step

        torch.set_num_threads(threads)
        return time_step(config, stage, counts_C, self._device)

    def open_world(self) -> tuple[str, int]:
        """Open the meeting point of two workers, and return its address and port."""
        address = ray.util.get_node_ip_address()
        self._rendezvous = Rendezvous(address, 2, host_here=True, timeout_s=_EXCHANGES_S)
        return address, self._rendezvous.port

    def time_all_reduce(self, rank: int, address: str, port: int) -> list[tuple[int, float]]:
        """Join the other worker and see `gauge.time_all_reduce`."""
        import torch
        import torch.distributed as dist

        from orchestration.preflight.gauge import time_all_reduce
        from orchestration.training.exchange import TorchGroup
        from orchestration.training.world import leave_world, use_network_of

        use_network_of(ray.util.get_node_ip_address())
        if rank:
            self._rendezvous = Rendezvous(address, 2, port=port, host_here=False, timeout_s=_EXCHANGES_S)
        assert self._rendezvous is not None
        self._rendezvous.join(rank, 2, gpu=self._device == "cuda", timeout_s=_EXCHANGES_S)
        try:
            return time_all_reduce(TorchGroup(dist.group.WORLD), torch.device(self._device))
        finally:
            leave_world()


def measure(task: Task) -> Measured:
    """Measure on the connected cluster. What cannot be measured, for lack of room say, is missing from the result."""
    found = Measured()
    with _gauges(task) as (first, partners), _note_problems(found, "a worker's speed"):
        everyone = [first, *partners.values()]
        ray.get([gauge.load.remote() for gauge in everyone], timeout=_START_S)
        for shape in task.configs:
            with _note_problems(found, f"a step of {plural(shape.workers, 'worker')}"):
                gauges = [first, *([partners[task.beside[shape]]] if shape in task.beside else [])]
                found.compute_s[shape] = {stage: _time_step(gauges, task, shape, stage) for stage in task.counts_C}
        for name, partner in partners.items():
            with _note_problems(found, f"the link {name}"):
                found.links[name] = _time_link(first, partner)
    return found


def _time_step(gauges: list[Any], task: Task, shape: MeshShape, stage: str) -> float:
    """Return the seconds of a step that some gauges take at the same time, on the slowest of them."""
    asked = task.configs[shape], stage, task.counts_C[stage], task.threads[shape]
    return max(ray.get([call(gauge.time_step, *asked) for gauge in gauges], timeout=_STEP_S))


def _time_link(first: Any, second: Any) -> list[tuple[int, float]]:
    address, port = ray.get(first.open_world.remote(), timeout=_EXCHANGES_S)
    both = [gauge.time_all_reduce.remote(rank, address, port) for rank, gauge in enumerate((first, second))]
    return ray.get(both, timeout=_EXCHANGES_S)[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def _gauges(task: Task) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Start a gauge on the first node and one for each partner; end them afterwards."""
    ids = {f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": node["NodeID"] for node in ray.nodes()}
    started = list[Any]()

    def start(node: str) -> Any:
        bundle = task.bundle
        gauge = SpeedGauge.options(  # type: ignore[attr-defined]
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=NodeAffinitySchedulingStrategy(ids[node], soft=False),
        ).remote("GPU" in bundle)
        started.append(gauge)
        return gauge

    try:
        first = start(task.first)
        yield first, {name: start(node) for name, node in task.partners.items()}
    finally:
        for gauge in started:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(gauge)


@contextlib.contextmanager
def _note_problems(found: Measured, what: str) -> Iterator[None]:
    """Take note of what could not be measured, and go on without it."""
    try:
        yield
    except GetTimeoutError:
        found.problems.append(f"{what} was not measured: no answer in time; are the places taken by another run?")
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found.problems.append(f"{what} was not measured: {lines[-1] if lines else type(error).__name__}")
