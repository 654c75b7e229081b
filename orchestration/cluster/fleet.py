"""The workers of one mesh as Ray actors in one placement group: reserve, start, call together, notice death, replace.

A worker that dies leaves its partners waiting in an exchange, so nothing here waits for all: the first failure ends the
call. `replace_lost` then fills the places of the dead, from warm spare processes where there are some; `kill` and
`start` fill all of them with new processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
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

from orchestration.cluster.connection import node_resources
from orchestration.cluster.failures import broken_exchange, failure_of, refusal
from orchestration.cluster.hangs import Watch
from orchestration.cluster.placement import GIB, NoRoom, bundle_of, check_fits, placement_wait_s, seats
from orchestration.cluster.ray_internals import draining_nodes
from orchestration.cluster.reachability import disconnected_pair, unreachable_from_here
from orchestration.cluster.sending import call
from orchestration.cluster.spares import Spares
from orchestration.cluster.transfer import Sent
from orchestration.cluster.warm import Kept, keep, take_kept
from orchestration.cluster.worker import Seat, Worker
from orchestration.config.run_config import RunConfig
from orchestration.training.mesh import MeshShape

_STACKS_FIRST_S = 30.0  # an exchange gives up this much after the watch has found the hang and written the stacks
_LOOK_S = 1.0  # between two looks at what a wait for places should do
_LEAVE_S = 5.0  # how long a survivor may take to give up a step that lost a partner
_DEATH_S = 3.0  # how long to look for the death that broke an exchange


class Fleet:
    """The actors of one mesh. `reserve` and `start` bring it up; `close` ends it.

    Args:
        config: with cpus_per_worker and threads resolved.
        shape: of the mesh.
        look: see `reserve`.

    Attributes:
        engine: of its workers, "torch" or "deepspeed".
        workers: actors in the order of ranks; empty before `start` and after `kill`.
        hosts: process, node and host name of each worker, in the order of ranks.
        report: takes lines for the operator about what training survives; by default they are lost.
        left_out: training images that cannot be read, once the first worker has looked for them; else None.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: MeshShape,
        look: Callable[[float, Callable[[], str]], None] = lambda waited_s, awaited: None,
    ) -> None:
        self.config, self.shape, self._look = config, shape, look
        self.engine = config.engine.chosen(shape.workers)
        assert config.cluster.cpus_per_worker is not None and config.engine.threads is not None
        self._bundle = bundle_of(config.cluster, config.cluster.cpus_per_worker)
        self.workers: list[Any] = []
        self.hosts: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] | None = None
        self._group: PlacementGroup | None = None
        self._seats: list[int] = []  # place in the group by rank
        self._kept: Kept | None = None  # workers of an earlier run, before `start`
        self._first_mib: list[float] = []  # memory of such workers after their first run
        self._failed = False
        self.report: Callable[[str], None] = lambda text: None
        self._spares = Spares(self._report)

    # Places

    def reserve(
        self, wait_s: float | None = None, look: Callable[[float, Callable[[], str]], None] | None = None
    ) -> None:
        """Reserve a place for each worker.

        Args:
            wait_s: seconds to wait for places that others hold; by default as for a command that somebody watches.
            look: called about once a second while it waits, with the seconds since it began and a function that says
                what is waited for. It may raise to end the wait. By default the fleet's own.

        Raises:
            NoRoom: the nodes could never hold the workers, or other runs hold the places.
        """
        self.check_room()
        if (kept := take_kept(self._likeness)) is not None:
            self._kept, self._group, self._seats = kept, kept.group, kept.seats
            return
        self._group = self._new_group(placement_wait_s(self.config.cluster) if wait_s is None else wait_s, look)
        # Ray fills places in an order of its own, so that neighbours among the places may be on different nodes.
        nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        self._seats = seats([nodes[place] for place in range(self.shape.workers)], self.shape.replicas)

    @property
    def _likeness(self) -> tuple[Any, ...]:
        """Return the facts that two fleets must share for one to take over the workers of the other."""
        shape, threads = self.shape, self.config.engine.threads
        return tuple(sorted(self._bundle.items())), shape.workers, shape.replicas, threads, self.engine

    def check_room(self) -> None:
        """Refuse to go on if the nodes that there are now could not hold the workers.

        Raises:
            NoRoom: says what was wanted and what each node has.
        """
        check_fits(self.shape.workers, self._bundle, node_resources())

    def _new_group(self, wait_s: float, look: Callable[[float, Callable[[], str]], None] | None) -> PlacementGroup:
        # Ray reserves all places or none, so two runs cannot wait for ever with half of the nodes each.
        group, begun = placement_group([self._bundle] * self.shape.workers, strategy="PACK"), time.monotonic()
        try:
            # In short waits: without a limit Ray would wait for ever, and signals are not seen meanwhile.
            while not group.wait(min(_LOOK_S, wait_s)):
                waited_s = time.monotonic() - begun
                if waited_s >= wait_s:
                    raise NoRoom(
                        f"cluster.workers = {self.shape.workers}: wanted {self._awaited()} after {wait_s:g} s of "
                        f"waiting; wait for other runs to end, lower cluster.workers or cluster.cpus_per_worker, or "
                        f"raise cluster.placement_timeout_s"
                    )
                (look or self._look)(waited_s, self._awaited)
        except BaseException:
            remove_placement_group(group)
            raise
        return group

    def _awaited(self) -> str:
        """Return the places that are wanted, and what is free of what there is."""
        free, all_ = ray.available_resources(), ray.cluster_resources()
        wanted, have, of = [], [], []
        for name, unit, size in (("CPU", "CPUs", 1), ("GPU", "GPUs", 1), ("memory", "GiB", GIB)):
            if name in self._bundle or name != "memory":
                wanted.append(f"{self._bundle.get(name, 0) / size:.4g} {unit}")
                have.append(f"{free.get(name, 0) / size:.4g} {unit}")
                of.append(f"{all_.get(name, 0) / size:.4g}")
        return f"{self.shape.workers} x ({', '.join(wanted)}), free are {', '.join(have)} of {', '.join(of)}"

    def move(self) -> None:
        """End all processes and reserve places again, on nodes that are not being drained.

        Raises:
            NoRoom: there are none.
        """
        self.close()
        self.reserve()

    # Processes

    def start(self) -> None:
        """Create the actors and import their libraries, all at once; reserve their places first if need be."""
        if self._group is None:
            self.reserve()
        kept, self._kept = self._kept, None
        self._first_mib = [] if kept is None else kept.first_mib
        self.workers, self.hosts = self._create(range(self.shape.workers)) if kept is None else kept.workers, []
        self.hosts = self.call("load_libraries", self.engine)

    def _create(self, ranks: Iterable[int], *, spare: bool = False) -> list[Any]:
        """Create processes in the places of some ranks; spare ones take no share of the CPUs there while they wait."""
        assert self._group is not None
        share = {} if spare else self._bundle
        # No restarts by Ray: it would not know the checkpoint. The supervisor replaces what dies.
        return [
            Worker.options(  # type: ignore[attr-defined]
                num_cpus=share.get("CPU", 0),
                num_gpus=share.get("GPU", 0),
                memory=share.get("memory", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=self._seats[rank]
                ),
            ).remote(gpu="GPU" in self._bundle, threads=self.config.engine.threads)
            for rank in ranks
        ]

    def keep_spares(self) -> None:
        """Start spare processes up to cluster.standby, without waiting until they are warm."""
        missing = range(len(self._spares), self.config.cluster.standby)
        engine, dataset = self.engine, self.config.dataset
        for spare in self._create([i % self.shape.workers for i in missing], spare=True):
            self._spares.add(spare, call(spare.warm_up, engine, dataset, self._left_out_paths()))

    def replace_lost(self) -> int:
        """Keep the workers that survived a loss, and fill the other places. Return how many spares were used.

        On GPUs all are started again: a worker that waits in an NCCL exchange for a dead partner does not come back.

        Raises:
            WorkerLost: as `call`.
        """
        if "GPU" in self._bundle or not self.hosts:
            self.kill()
            self.start()
            return 0
        self._failed = True
        lost = sorted(set(range(self.shape.workers)) - self._survivors())
        for rank in lost:  # one that did not answer in time may still live, and hold its place
            with contextlib.suppress(RayError, ValueError):
                ray.kill(self.workers[rank])

        # Fewer spares than losses is the usual case: new processes take the rest.
        nodes = [self.hosts[rank]["node_id"] for rank in lost]
        # `load_libraries` is quick the second time, and promises the node again.
        spares = self._spares.take(nodes, lambda unused: unused.load_libraries.remote(self.engine))
        warm = dict(zip(lost, spares, strict=False))
        cold = [rank for rank in lost if rank not in warm]
        for rank, worker in (warm | dict(zip(cold, self._create(cold), strict=True))).items():
            self.workers[rank] = worker
        self.hosts = self.call("load_libraries", self.engine)
        return len(warm)

    def _report(self, text: str) -> None:
        self.report(text)

    def _survivors(self) -> set[int]:
        """Return the ranks of the workers that gave up their mesh in time."""
        refs = {worker.leave.remote(): rank for rank, worker in enumerate(self.workers)}
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_LEAVE_S)
        alive = set()
        for ref in done:
            with contextlib.suppress(RayError):
                ray.get(ref)
                alive.add(refs[ref])
        return alive

    def kill(self) -> None:
        """End the workers' processes at once; spare ones stay."""
        self._failed = True
        for worker in self.workers:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(worker)
        self.workers = []

    def hand_on(self) -> None:
        """Keep the workers for the next run of this process, if it keeps any and nothing has failed; see warm.py.

        `close` ends them otherwise.
        """
        if self._group is None or self._failed:
            return
        if keep(self._likeness, self.workers, self._group, self._seats, self._first_mib):
            self.workers, self._group = [], None

    def close(self) -> None:
        """End the workers and give their places back. Goes on past failures."""
        kept, self._kept = self._kept, None
        self.workers = self.workers or ([] if kept is None else kept.workers)
        self.kill()
        self._spares.close()
        if self._group is not None:
            with contextlib.suppress(RayError, ValueError):
                remove_placement_group(self._group)
            self._group = None

    # Calls

    def build(self, stage: str, teachers: dict[str, str | Sent] | None = None) -> list[dict[str, Any]]:
        """Seat every worker in a new world and build its part of a stage.

        Args:
            stage: its name.
            teachers: folders of their exported models, by name.

        Returns:
            What `Worker.build` returned, in the order of ranks.
        """
        shape, dataset = self.shape, self.config.dataset
        if dataset.quarantine and self.left_out is None:
            self.left_out = self._one(self.workers[0].find_unreadable.remote(dataset))

        # Apart from `build`, so that no worker waits in the world for one that still reads.
        left_out = self._left_out_paths()
        self.call("open_data", dataset, left_out)

        # A new world for each build, on a port that rank 0 finds free: an old port may still be taken.
        timeout_s = self.config.cluster.heartbeat_timeout_s + _STACKS_FIRST_S
        address, port = self._one(self.workers[0].open_world.remote(shape.workers, timeout_s))
        return self._together(
            [
                call(
                    worker.build,
                    self.config,
                    stage,
                    Seat(rank, shape, address, port, timeout_s),
                    teachers or {},
                    left_out,
                )
                for rank, worker in enumerate(self.workers)
            ]
        )

    def _left_out_paths(self) -> list[str] | None:
        return None if self.left_out is None else [item["path"] for item in self.left_out]

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call one method on every worker and return all answers in the order of ranks.

        Raises:
            WorkerLost: a worker died or hangs.
            ValueError, FloatingPointError, OSError: what a worker refused, in its words.
        """
        return self._together([call(getattr(worker, method), *args) for worker in self.workers])

    def _one(self, ref: Any) -> Any:
        """Wait for an answer of the first worker."""
        return self._together([ref])[0]

    def _together(self, refs: list[Any]) -> list[Any]:
        """Wait for the answers of the first workers, one each, in the order of ranks.

        Raises:
            WorkerLost, ValueError, FloatingPointError, OSError: as `call`.
        """
        answers: dict[Any, Any] = {}
        pending = list(refs)
        watch = Watch(self.workers[: len(refs)], self.config.cluster.heartbeat_timeout_s)
        while pending:
            self._spares.look()
            # One answer at a time: after a death the others may never come.
            done, pending = ray.wait(pending, num_returns=1, timeout=2.0)
            for ref in done:
                try:
                    answers[ref] = ray.get(ref)
                except RayError as error:
                    raise self._diagnose(error, pending) from error
            if not done:  # only those still at work can hang: a worker that has answered is idle by right
                watch.look([rank for rank, ref in enumerate(refs) if ref not in answers])
        return [answers[ref] for ref in refs]

    def _diagnose(self, error: RayError, pending: list[Any]) -> Exception:
        """Find what a failed call means. A partner's broken exchange is often seen before the death that caused it."""
        if not isinstance(error, RayTaskError):
            return failure_of(error)
        refused = refusal(error)
        if refused is not None:
            return refused

        # Not a refusal: an exchange broke. Its partners' answers, which come within seconds, tell who died, or who
        # refused and left the exchange.
        later, _ = ray.wait(pending, num_returns=len(pending), timeout=_DEATH_S) if pending else ([], [])
        for ref in later:
            try:
                ray.get(ref)
            except (RayActorError, OutOfMemoryError) as death:
                return failure_of(death)
            except RayTaskError as other:
                refused = refused or refusal(other)
            except RayError:
                continue
        return refused or broken_exchange(error) or error

    # Nodes

    @property
    def node_ids(self) -> list[str]:
        """Ids of the workers' nodes, in the order of ranks."""
        return [host["node_id"] for host in self.hosts]

    def crowded_nodes(self) -> Iterator[str]:
        """Yield a message for each node whose workers have more threads than CPUs that they may use."""
        threads = self.config.engine.threads or 1
        for node in dict.fromkeys(self.node_ids):
            there = [host for host in self.hosts if host["node_id"] == node]
            cpus = there[0]["cpus"]
            if threads > 1 and threads * len(there) > cpus:
                yield (
                    f"node {there[0]['node']}: its workers have {threads * len(there)} threads, and a CPU set or quota "
                    f"leaves them {cpus} CPUs, which is slower than as many threads; start Ray there with "
                    f"--num-cpus={cpus}, or set engine.threads={max(1, cpus // len(there))} for a new run"
                )

    def unreachable_nodes(self) -> list[str]:
        """Return the addresses of nodes under this fleet that Ray counts as alive, but whose raylets do not answer."""
        ours = set(placement_group_table(self._group)["bundles_to_node_id"].values())
        raylets = {
            node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"])
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] in ours
        }
        return [raylets[node][0] for node in unreachable_from_here(raylets)]

    def leaving_nodes(self) -> set[str]:
        """Return the ids of the workers' nodes that are being drained, or are gone."""
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]}.difference(draining_nodes())
        return set(self.node_ids) - staying

    def disconnected_nodes(self) -> tuple[str, str] | None:
        """Return the addresses of two nodes whose workers do not reach each other; None if all do.

        Raises:
            WorkerLost: as `call`.
        """
        nodes = self.node_ids
        if len(set(nodes)) == 1:
            return None
        # Workers of one node share its network: one listener per node is enough.
        opened = dict(zip(nodes, self.call("listen"), strict=True))
        listeners = {node: listener for node, listener in opened.items() if listener is not None}
        pair = disconnected_pair(nodes, self.call("unreachable_from_here", listeners))
        if pair is None:
            return None
        address = {host["node_id"]: host["node"] for host in self.hosts}
        return address[pair[0]], address[pair[1]]
