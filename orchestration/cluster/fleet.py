"""The workers of one mesh as Ray actors in one placement group: place, call together, notice death, start again.

A worker that dies leaves its partners waiting in an exchange, so nothing here waits for all: the first failure ends the
call. `mend` then fills the places of the dead, from warm spare processes where there are some; `kill` and `start` fill
all of them anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestration.cluster.connection import (
    node_resources,
)
from orchestration.cluster.failures import broken_exchange, failure_of, refusal
from orchestration.cluster.hangs import Watch
from orchestration.cluster.placement import GIB, bundle_of, check_fits
from orchestration.cluster.preemption import draining_nodes
from orchestration.cluster.reachability import answering, cut_off
from orchestration.cluster.transfer import Sent
from orchestration.cluster.worker import Seat, Worker
from orchestration.config.run_config import RunConfig
from orchestration.training.mesh import MeshShape

_STACKS_FIRST_S = 30.0  # an exchange gives up this much after the watch has found the hang and kept its stacks
_LEAVE_S = 5.0  # how long a survivor may take to give up a step that lost a partner


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
        self.left_out: list[dict[str, Any]] | None = None  # training images, once the first worker has looked at all
        self._spares: list[tuple[Any, Any]] = []  # process, and the promise of what it says of itself once it is warm
        self._avoided: dict[str, str] = {}  # addresses of nodes that others did not reach, by id
        self.check_room()
        self._group = self._reserve()

    def _reserve(self) -> PlacementGroup:
        bundle, workers = bundle_of(self.config.cluster, self._cpus), self.shape.workers
        elsewhere = [{"ray.io/node-id": f"!in({','.join(self._avoided)})"}] * workers if self._avoided else None
        group = placement_group([bundle] * workers, strategy="PACK", bundle_label_selector=elsewhere)
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
        self.workers, self.hosts = self._create(range(self.shape.workers)), []
        self.hosts = self.call("load_libraries", self.config.engine.name)

    def _create(self, ranks: Iterable[int], *, spare: bool = False) -> list[Any]:
        """New processes in the places of some ranks; spare ones take no share of the CPUs there while they wait."""
        return [
            Worker.options(  # type: ignore[attr-defined]
                num_cpus=0 if spare else self._cpus,
                num_gpus=0 if spare else self._gpus,
                memory=0 if spare else (self.config.cluster.memory_gib_per_worker or 0) * GIB,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
            ).remote(gpu=self._gpus > 0, threads=self.config.engine.threads)
            for rank in ranks
        ]

    def keep_spares(self) -> None:
        """Start spare processes up to cluster.standby, without waiting until they are warm."""
        missing = range(len(self._spares), self.config.cluster.standby)
        data = self.config.model_dump(mode="json")["dataset"]
        for spare in self._create([i % self.shape.workers for i in missing], spare=True):
            self._spares.append((spare, spare.warm_up.remote(self.config.engine.name, data, self._paths_left_out())))

    def mend(self) -> int:
        """Keep the workers that survived a loss and fill the other places. Returns how many spares were used.

        On GPUs all are started again: who waits in an NCCL exchange for a dead partner does not come back.

        Raises:
            WorkerLost: as `call`.
        """
        if self._gpus or not self.hosts:
            self.kill()
            self.start()
            return 0
        lost = sorted(set(range(self.shape.workers)) - self._survivors())
        for rank in lost:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(self.workers[rank])
        warm = dict(zip(lost, self._warm([self.hosts[rank]["node_id"] for rank in lost]), strict=False))
        cold = [rank for rank in lost if rank not in warm]
        for rank, worker in (warm | dict(zip(cold, self._create(cold), strict=True))).items():
            self.workers[rank] = worker
        self.hosts = self.call("load_libraries", self.config.engine.name)
        return len(warm)

    def _survivors(self) -> set[int]:
        """Ranks of the workers that gave up their mesh in time."""
        refs = {worker.leave.remote(): rank for rank, worker in enumerate(self.workers)}
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_LEAVE_S)
        alive = set()
        for ref in done:
            with contextlib.suppress(RayError):
                ray.get(ref)
                alive.add(refs[ref])
        return alive

    def _warm(self, nodes: list[str]) -> list[Any]:
        """A warm spare process for each of some nodes, as far as there are any; on that node if possible."""
        ready = []
        for spare in list(self._spares):
            done, _ = ray.wait([spare[1]], timeout=0)
            if done:
                self._spares.remove(spare)
                with contextlib.suppress(RayError):  # warm once, and dead since, is a spare no more
                    ray.get(spare[0].heartbeat.remote(), timeout=1.0)
                    ready.append((ray.get(spare[1])["node_id"], spare[0]))
        chosen = []
        for node in nodes[: len(ready)]:
            ready.sort(key=lambda found, node=node: found[0] != node)  # type: ignore[misc]
            chosen.append(ready.pop(0)[1])
        for _, unused in ready:
            self._spares.append((unused, unused.load_libraries.remote(self.config.engine.name)))
        return chosen

    @property
    def node_ids(self) -> list[str]:
        """Of the workers, in the order of ranks."""
        return [host["node_id"] for host in self.hosts]

    def build(self, stage: str, teachers: dict[str, str | Sent] | None = None) -> list[dict[str, Any]]:
        """Seat every worker in a new world and build its part of a stage.

        Args:
            stage: its name.
            teachers: folders of their exported models, by name.

        Returns:
            What each said of itself.
        """
        shape = self.shape
        tree = self.config.model_dump(mode="json")
        if self.config.dataset.quarantine and self.left_out is None:
            self.left_out = self._one(self.workers[0].find_unreadable.remote(tree["dataset"]))
        left_out = self._paths_left_out()
        self.call("open_data", tree["dataset"], left_out)  # apart, so that nobody waits in the world for who is reading
        timeout_s = self.config.cluster.heartbeat_timeout_s + _STACKS_FIRST_S
        address, port = self._one(self.workers[0].open_world.remote(shape.workers, timeout_s))
        seats = [
            Seat(rank, shape.num_experts, shape.experts_per_worker, shape.replicas, address, port, timeout_s)
            for rank in range(shape.workers)
        ]
        return self._together(
            [
                worker.build.remote(tree, stage, seat, teachers or {}, left_out)
                for worker, seat in zip(self.workers, seats, strict=True)
            ]
        )

    def _paths_left_out(self) -> list[str] | None:
        return None if self.left_out is None else [item["path"] for item in self.left_out]

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call one method on every worker and return all answers in the order of ranks.

        Raises:
            WorkerLost: a worker died or hangs.
            ValueError, FloatingPointError, OSError: what a worker refused, in its words.
        """
        return self._together([getattr(worker, method).remote(*args) for worker in self.workers])

    def _one(self, ref: Any) -> Any:
        """The answer of the first worker."""
        return self._together([ref])[0]

    def _together(self, refs: list[Any]) -> list[Any]:
        """All answers, of the first workers in order. Who has answered may idle."""
        answers: dict[Any, Any] = {}
        pending = list(refs)
        watch = Watch(self.workers[: len(refs)], self.config.cluster.heartbeat_timeout_s)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=2.0)
            for ref in done:
                try:
                    answers[ref] = ray.get(ref)
                except RayError as error:
                    raise self._diagnose(error, pending) from error
            if not done:
                watch.look([rank for rank, ref in enumerate(refs) if ref not in answers])
        return [answers[ref] for ref in refs]

    def _diagnose(self, error: RayError, pending: list[Any]) -> Exception:
        """What a failed call means. A partner's broken exchange is often seen before the death that caused it."""
        if not isinstance(error, RayTaskError):
            return failure_of(error)
        found = refusal(error)
        if found is not None:
            return found
        later, _ = ray.wait(pending, num_returns=len(pending), timeout=3.0) if pending else ([], [])
        for ref in later:
            try:
                ray.get(ref)
            except (RayActorError, OutOfMemoryError) as death:
                return failure_of(death)
            except RayError:
                continue
        return broken_exchange(error) or error

    def check_room(self) -> None:
        """Whether the mesh can be started again in its places.

        Raises:
            ValueError: the cluster has shrunk and the mesh no longer fits; wanted and available.
        """
        memory = self.config.cluster.memory_gib_per_worker
        try:
            check_fits(self.shape.workers, self._cpus, self._gpus, node_resources(self._avoided), memory)
        except ValueError as reason:
            if not self._avoided:
                raise
            avoided = ", ".join(self._avoided.values())
            raise ValueError(f"{reason} ({avoided} not counted: another node did not reach it)") from reason

    def silent_nodes(self) -> list[str]:
        """Addresses of nodes under this fleet that Ray counts as living, but whose raylets do not answer."""
        ours = set(placement_group_table(self._group)["bundles_to_node_id"].values())
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] in ours]
        answers = answering([(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes])
        return [node["NodeManagerAddress"] for node, answered in zip(nodes, answers, strict=True) if not answered]

    def leaving_nodes(self) -> set[str]:
        """Ids of the workers' nodes that are being drained, or are gone."""
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]}.difference(draining_nodes())
        return set(self.node_ids) - staying

    def cut(self) -> tuple[str, str] | None:
        """Ids of two nodes whose workers do not reach each other, the one to do without last; None if all do.

        Raises:
            WorkerLost: as `call`.
        """
        nodes = self.node_ids
        if len(set(nodes)) == 1:
            return None
        opened = dict(zip(nodes, self.call("open_door"), strict=True))
        doors = {node: door for node, door in opened.items() if door is not None}
        return cut_off(nodes, self.call("silent", doors))

    def avoid(self, node_id: str) -> None:
        """Reserve no place on a node any more, from the next `move`.

        Raises:
            ValueError: the mesh does not fit the other nodes; this one is not avoided then.
        """
        self._avoided[node_id] = self.address_of(node_id)
        try:
            self.check_room()
        except ValueError:
            del self._avoided[node_id]
            raise

    def address_of(self, node_id: str) -> str:
        """Of a node with a worker."""
        return next(host["node"] for host in self.hosts if host["node_id"] == node_id)

    def kill(self) -> None:
        """End the workers' processes at once; spare ones stay."""
        for worker in self.workers:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(worker)
        self.workers = []

    def move(self) -> None:
        """End all processes and reserve places anew, on nodes that are neither being drained nor avoided.

        Raises:
            ValueError: there are none.
        """
        self.close()
        self.check_room()
        self._group = self._reserve()

    def close(self) -> None:
        """End the workers and give their places back. Goes on past failures."""
        self.kill()
        for spare, _ in self._spares:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(spare)
        self._spares = []
        with contextlib.suppress(RayError, ValueError):
            remove_placement_group(self._group)
