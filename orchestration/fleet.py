"""The workers of one mesh as Ray actors in one placement group: place, call together, notice death, start again.

A worker that dies leaves its partners waiting in an exchange, so nothing here waits for all: the first failure ends the
call, and `restart` kills the rest of the mesh and fills the same placement group anew.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestration.actors import Seat, Worker
from orchestration.config import ClusterConfig, EngineConfig, RunConfig
from orchestration.mesh import MeshShape
from orchestration.own_ray import start_own_ray

_MAX_THREADS = 8  # on one worker by default; small images do not use more
_EXCHANGE_WORDS = ("gloo", "nccl", "torch/distributed", "torch.distributed")  # in the trace of a broken exchange


class WorkerLost(RuntimeError):
    """A worker died or hangs; the run can go on from its newest checkpoint."""


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A connection to Ray: the one there is, the one at `address`, or one of our own that ends with the context."""
    if ray.is_initialized():
        yield
        return
    start_ray(address)
    try:
        yield
    finally:
        ray.shutdown()


def start_ray(address: str | None) -> None:
    """Connect to a Ray cluster, or start one here when neither `address` nor RAY_ADDRESS names one.

    Raises:
        ValueError: there is no cluster at the address.
    """
    named = address or os.environ.get("RAY_ADDRESS")
    if not named:
        start_own_ray()
        return
    _check_listening(named)
    try:
        ray.init(address=named, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"cluster.address = {named}: no Ray cluster answers ({str(error).splitlines()[0]}); "
            f"start one with `ray start --head`, correct the address, or unset it to run on this machine alone"
        ) from error


def _check_listening(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes and then end the process.

    Raises:
        ValueError: nobody listens, or it is the address of a Ray Client.
    """
    if address.startswith("ray://"):
        raise ValueError(
            f"cluster.address = {address}: a run must be driven from inside the cluster; needed auto or host:port; "
            f"use `ray job submit --working-dir . -- python -m orchestration train ...`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # 'auto' and 'local'
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cluster.address = {address}: nobody listens there ({error}); needed the address of a running Ray head; "
            f"start one with `ray start --head`, correct the address, or unset it to run on this machine alone"
        ) from error


def resolve_resources(config: ClusterConfig, engine: EngineConfig, workers: int) -> tuple[float, int]:
    """CPUs and threads of a worker, where the config leaves them open.

    Returns:
        cpus_per_worker and threads; a share of the cluster's CPUs, whole ones where there is more than one.
    """
    cpus = config.cpus_per_worker
    if cpus is None:
        cpus = largest_share(workers, [node.get("CPU", 0.0) for node in node_resources().values()])
    return cpus, engine.threads or max(1, int(cpus))


def largest_share(workers: int, cpus_of_nodes: list[float]) -> float:
    """The most CPUs that each of some workers can have: whole ones, else hundredths of one; at most 8."""
    shares = [float(whole) for whole in range(_MAX_THREADS, 0, -1)] + [part / 100 for part in range(99, 0, -1)]
    for share in shares:
        if sum(math.floor(cpus / share + 1e-6) for cpus in cpus_of_nodes) >= workers:
            return share
    return shares[-1]  # more than a hundred workers a core: refused by `check_fits`


def node_resources() -> dict[str, dict[str, float]]:
    """All resources of every living node, by its address."""
    return {
        f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": dict(node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    }


def check_fits(workers: int, cpus: float, gpus: float, nodes: dict[str, dict[str, float]]) -> None:
    """Refuse a placement that can never be met.

    Raises:
        ValueError: wanted and available, by node.
    """

    def places(node: dict[str, float]) -> int:
        fits = [math.floor(node.get("CPU", 0.0) / cpus + 1e-6)]
        if gpus:
            fits.append(math.floor(node.get("GPU", 0.0) / gpus))
        return min(fits)

    possible = sum(places(node) for node in nodes.values())
    if possible < workers:
        have = ", ".join(f"{name}: {n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for name, n in nodes.items())
        raise ValueError(
            f"cluster.workers = {workers}: wanted {workers} x ({cpus:g} CPUs, {gpus:g} GPUs), the cluster has places "
            f"for {possible} ({have}); lower cluster.workers or cluster.cpus_per_worker (fractions are allowed), set "
            f"cluster.gpus_per_worker=0, or add nodes"
        )


class Fleet:
    """The actors of one mesh.

    Args:
        config: with cpus_per_worker and threads resolved.
        shape: of the mesh.

    Raises:
        ValueError: the placement cannot be met.
    """

    def __init__(self, config: RunConfig, shape: MeshShape) -> None:
        self.config, self.shape = config, shape
        cluster_config = config.cluster
        assert cluster_config.cpus_per_worker is not None and config.engine.threads is not None
        self._cpus, self._gpus = cluster_config.cpus_per_worker, cluster_config.gpus_per_worker
        self.workers: list[Any] = []
        self.hosts: list[dict[str, Any]] = []
        check_fits(shape.workers, self._cpus, self._gpus, node_resources())
        self._group = self._reserve()

    def _reserve(self) -> PlacementGroup:
        bundle = {"CPU": self._cpus} | ({"GPU": float(self._gpus)} if self._gpus else {})
        group = placement_group([bundle] * self.shape.workers, strategy="PACK")
        wait_s = self.config.cluster.placement_timeout_s
        if not group.wait(wait_s):
            free = ray.available_resources()
            remove_placement_group(group)
            raise ValueError(
                f"cluster.workers = {self.shape.workers}: wanted {self.shape.workers} x ({self._cpus:g} CPUs, "
                f"{self._gpus} GPUs), free after {wait_s:g} s are {free.get('CPU', 0):g} CPUs and "
                f"{free.get('GPU', 0):g} GPUs of {ray.cluster_resources().get('CPU', 0):g} and "
                f"{ray.cluster_resources().get('GPU', 0):g}; wait for other runs to end, lower cluster.workers or "
                f"cluster.cpus_per_worker, or raise cluster.placement_timeout_s"
            )
        return group

    def start(self) -> None:
        """Create the actors and import their libraries, all at once."""
        engine = self.config.engine
        self.workers = [
            Worker.options(  # type: ignore[attr-defined]
                num_cpus=self._cpus,
                num_gpus=self._gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=i),
            ).remote(gpu=self._gpus > 0, threads=engine.threads)
            for i in range(self.shape.workers)
        ]
        self.hosts = self.call("load_libraries", engine.name)

    def build(self, stage: str, teachers: dict[str, str] | None = None) -> list[dict[str, Any]]:
        """Seat every worker in a new world and build its part of a stage.

        Args:
            stage: its name.
            teachers: folders of their exported models, by name.

        Returns:
            What each said of itself.
        """
        shape = self.shape
        address, port = self._one(self.workers[0].open_world.remote(shape.workers))
        tree = self.config.model_dump(mode="json")
        timeout_s = self.config.cluster.heartbeat_timeout_s
        seats = [
            Seat(rank, shape.num_experts, shape.experts_per_worker, shape.replicas, address, port, timeout_s)
            for rank in range(shape.workers)
        ]
        return self._together(
            [w.build.remote(tree, stage, seat, teachers or {}) for w, seat in zip(self.workers, seats, strict=True)]
        )

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call one method on every worker and return all answers in the order of ranks.

        Raises:
            WorkerLost: a worker died or hangs.
            ValueError, FloatingPointError, OSError: what a worker refused, in its words.
        """
        return self._together([getattr(worker, method).remote(*args) for worker in self.workers])

    def _one(self, ref: Any) -> Any:
        return self._together([ref])[0]

    def _together(self, refs: list[Any]) -> list[Any]:
        answers: dict[Any, Any] = {}
        pending = list(refs)
        watch = _Watch(self.workers, self.config.cluster.heartbeat_timeout_s)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=2.0)
            for ref in done:
                try:
                    answers[ref] = ray.get(ref)
                except RayError as error:
                    raise self._diagnose(error, pending) from error
            if not done:
                watch.look()
        return [answers[ref] for ref in refs]

    def _diagnose(self, error: RayError, pending: list[Any]) -> Exception:
        """What a failed call means. A partner's broken exchange is often seen before the death that caused it."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, ValueError | FloatingPointError | OSError):
                return cause
            if type(cause).__name__ == "OutOfMemoryError":
                return ValueError(
                    f"a worker's GPU is out of memory ({_last_line(str(cause))}); use more workers "
                    f"(cluster.workers, cluster.experts_per_worker), or engine.precision=autocast"
                )
            later, _ = ray.wait(pending, num_returns=len(pending), timeout=3.0) if pending else ([], [])
            for ref in later:
                try:
                    ray.get(ref)
                except RayActorError as death:
                    return WorkerLost(_words_of(death))
                except RayError:
                    continue
            if any(word in str(error).lower() for word in _EXCHANGE_WORDS):
                return WorkerLost(f"an exchange between workers failed: {_last_line(str(error))}")
            return error
        return WorkerLost(_words_of(error))

    def check_room(self) -> None:
        """Whether the mesh can be started again in its places.

        Raises:
            ValueError: the cluster has shrunk and the mesh no longer fits; wanted and available.
        """
        check_fits(self.shape.workers, self._cpus, self._gpus, node_resources())

    def kill(self) -> None:
        """End the worker processes at once."""
        for worker in self.workers:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(worker)
        self.workers = []

    def close(self) -> None:
        """End the workers and give their places back. Goes on past failures."""
        self.kill()
        with contextlib.suppress(RayError, ValueError):
            remove_placement_group(self._group)


class _Watch:
    """Finds workers that hang: asked beside their work, they say when they last finished something."""

    def __init__(self, workers: list[Any], limit_s: float) -> None:
        self._workers, self._limit_s = workers, limit_s
        self._answered = dict.fromkeys(range(len(workers)), time.monotonic())

    def look(self) -> None:
        """Ask all.

        Raises:
            WorkerLost: one has not finished anything, or not answered, for the limit.
        """
        refs = {worker.heartbeat.remote(): rank for rank, worker in enumerate(self._workers)}
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=min(1.0, self._limit_s))
        for ref in done:
            with contextlib.suppress(RayError, GetTimeoutError):
                step, idle_s = ray.get(ref)
                self._answered[refs[ref]] = time.monotonic()
                if idle_s > self._limit_s:
                    raise WorkerLost(f"worker {refs[ref]} has finished nothing for {idle_s:.0f} s, after step {step}")
        for rank, at in sorted(self._answered.items(), key=lambda item: item[1]):
            if time.monotonic() - at > self._limit_s:
                raise WorkerLost(f"worker {rank} has not answered for {self._limit_s:g} s")


def _words_of(error: RayError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "memory" in line.lower()] or lines
    return f"a worker died: {telling[0] if telling else type(error).__name__}"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
