"""A run from its first word to its report: place workers, train wave after wave of stages, survive deaths, tell.

prepare   config -> run folder (lock, same config as before?)        `train`
place     workers in placement groups, libraries loaded              `Fleet`
train     each stage on a fleet, some side by side                   `Lane` (lane.py), `StageRun`
finish    evaluation/*.json, export/*, report/*, table on stdout     `finish.py`
"""

from __future__ import annotations

from orchestration.runs.driver import train, _resolved, _gave_up

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orchestration.cluster.connection import cluster, node_resources, resolve_resources
from orchestration.cluster.failures import WorkerLost
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.preemption import DrainNotices, Preempted
from orchestration.config.recipe import Source
from orchestration.config.run_config import RunConfig
from orchestration.runs.console import Console
from orchestration.runs.supervisor import Lane
from orchestration.runs.stopping import GivenUp, Outcome, Stopped, StopSignals
from orchestration.runs.stage_run import write_evaluations
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.exports import check_sources, model_folder
from orchestration.storage.journal import Journal
from orchestration.storage.location import check_run_dir
from orchestration.storage.run_folder import RunFolder
from orchestration.training.mesh import MeshShape, mesh_shape

_MEMORY_RESTARTS = 1  # a worker that is out of memory will most likely be so again






class Run:
    """All stages of a run, through deaths of workers."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        console: Console,
        fleet: Fleet,
        signals: StopSignals,
        marks: dict[str, float],
        begin_tracking: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.folder, self.console, self.fleet = config, folder, console, fleet
        self.signals, self.marks, self._begin_tracking = signals, marks, begin_tracking
        self.checkpoints = Checkpoints(folder.path, list(config.method.stages))
        self.journal = Journal(folder.path)
        self.preemptions = 0
        self._taken: set[str] = set()  # ids of nodes whose loss was counted
        self._told: frozenset[str] = frozenset()
        self.drains = DrainNotices()
        self.cost = Cost(folder, config)
        self._described = False
        self._seated: dict[int, list[dict[str, Any]]] = {}
        self._models: dict[tuple[str | None, str | None, str], Path] = {}
        self._changing = threading.Lock()

    def carry_out(self) -> Outcome:
        """Train every stage from its newest checkpoint, or its beginning, to its end."""
        self.checkpoints.clean()
        limit, before = self.config.run.max_steps, 0
        with self.journal:
            for wave in self.config.method.waves():
                outcomes = self._wave(wave, before)
                before += sum(outcome.total_steps for outcome in outcomes)
                if not all(o.finished for o in outcomes) or (limit is not None and before >= limit):
                    break
        self.checkpoints.clean()  # a worker that died while it wrote left a folder half-written
        last = outcomes[-1]
        last.finished = last.finished and last.stage == self.checkpoints.stages[-1]
        return last

    def _wave(self, stages: list[str], before: int) -> list[Outcome]:
        """Stages that wait for none of each other, side by side as far as the cluster has places."""
        done = {stage: self._finished(stage) for stage in stages}
        # The last of a run is begun again even if it is trained: its evaluations may not have been written.
        left = [stage for stage in stages if done[stage] is None or stage == self.checkpoints.stages[-1]]
        fleets = self._more_fleets(len(left))
        try:
            if len(left) == 1:
                done[left[0]] = Lane(self, self.fleet, self.console).carry_out(left[0], before)
            elif left:
                done |= self._beside(left, fleets, before)
        finally:
            for fleet in fleets[1:]:
                self.cost.change(-len(fleet.workers))
                self._seated.pop(id(fleet), None)
                fleet.close()
        return [outcome for outcome in done.values() if outcome is not None]

    def _finished(self, stage: str) -> Outcome | None:
        """How a stage ended at an earlier start, if it did; what that start was killed before writing is written."""
        newest = self.checkpoints.newest(stage, self.console.message)
        if newest is None or newest.state["step"] < newest.state["total_steps"]:
            return None
        best = newest.state["best"]
        if (
            best
            and best["step"] == newest.state["step"]
            and not (self.checkpoints.folder / best["checkpoint"]).exists()
        ):
            self.checkpoints.copy_weights(newest.folder, best["checkpoint"])
        if self.config.method.stages[stage].classes is not None:  # others' are the last stage's to write
            write_evaluations(self.folder, self.config, stage, newest.state)
        return Outcome(stage, True, newest.state["total_steps"], newest.folder)

    def _more_fleets(self, wanted: int) -> list[Fleet]:
        """The run's fleet, and further ones as far as there are places now."""
        fleets = [self.fleet]
        if self.config.cluster.side_by_side is not None:
            wanted = min(wanted, self.config.cluster.side_by_side)
        while len(fleets) < wanted:
            try:
                fleets.append(Fleet(self.config, self.fleet.shape))
            except ValueError as reason:
                self.console.message(f"{len(fleets)} of {wanted} stages train side by side: {reason}")
                break
        return fleets

    def _beside(self, stages: list[str], fleets: list[Fleet], before: int) -> dict[str, Outcome]:
        """Train stages on several fleets, each fleet the next stage when it is free. The first failure ends all."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for stage in stages:
            waiting.put(stage)
        outcomes: dict[str, Outcome] = {}

        def work(fleet: Fleet) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    stage = waiting.get_nowait()
                    lane = Lane(self, fleet, self.console.beside(stage))
                    try:
                        outcomes[stage] = lane.carry_out(stage, before)
                    except BaseException:
                        self.signals.given_up.set()
                        raise

        with ThreadPoolExecutor(len(fleets), thread_name_prefix="stage") as threads:
            working = [threads.submit(work, fleet) for fleet in fleets]
            try:
                errors = [future.exception() for future in working]
            except BaseException:  # a second Ctrl-C: nobody waits for checkpoints any more
                self.signals.given_up.set()
                for fleet in fleets:
                    fleet.kill()
                raise
        found = sorted((e for e in errors if e is not None), key=lambda e: isinstance(e, Stopped) + 2 * _gave_up(e))
        for error in found[1:]:
            self.console.message(str(error))
        for error in found[:1]:
            raise error
        return outcomes

    def check_wanted(self, stage: str) -> None:
        """Refuse to begin with a stage, or to go on with it, when the run is to end.

        Raises:
            Stopped, GivenUp: as the case may be.
        """
        if self.signals.received is not None:
            raise Stopped(
                self.signals.received,
                f"stopped before the workers of stage {stage} were started; the same command continues from its "
                f"newest checkpoint",
            )
        if self.signals.given_up.is_set():
            raise GivenUp(f"stage {stage}: its workers were not started any more")

    def model(self, source: Source) -> Path:
        """The exported model of a source; a stage of this run is exported once, whoever asks first."""
        asked = source.stage, source.run, source.weights
        with self._changing:
            if asked not in self._models:
                self._models[asked] = model_folder(self.config, self.folder, self.checkpoints, source)
            return self._models[asked]

    def begin_tracking(self) -> None:
        """Start the upload, once there is something to send."""
        with self._changing:
            self._begin_tracking()

    def started(self, fleet: Fleet, stage: str) -> None:
        """Note which workers a stage has; their libraries are loaded."""
        shape = fleet.shape
        with self._changing:
            self.marks.setdefault("libraries", time.time())
            self._seated[id(fleet)] = [host | {"stage": stage} for host in fleet.hosts]
            workers = [host for hosts in self._seated.values() for host in hosts]
            if self._described:
                self.folder.note(workers=workers)
                return
            self._described = True
            self.folder.describe(
                self.config,
                workers,
                {"slots": shape.slots, "replicas": shape.replicas, "experts_per_worker": shape.experts_per_worker},
            )

    def tell_once(self, text: str) -> None:
        """A message that each start of a stage would repeat."""
        with self._changing:
            told, self._told = text in self._told, self._told | {text}
        if not told:
            self.console.message(text)

    def lost(self, loss: WorkerLost, stage: str, in_a_row: Counter[str]) -> None:
        """Count a failure.

        Args:
            loss: what happened.
            stage: whose workers are to be started again.
            in_a_row: its failures without a new checkpoint between, this one included, by `WorkerLost.why`.

        Raises:
            WorkerLost: there were too many.
        """
        limit, full, failures = self.config.cluster.max_failures, in_a_row["memory"], in_a_row.total()
        why = None
        if full > min(limit, _MEMORY_RESTARTS):
            why = (
                f"out of memory {full} times in a row; use larger nodes, more workers, a smaller "
                f"dataset.resident_mib or fewer dataset.loader_processes"
            )
        elif failures > limit:
            why = (
                f"{failures} failures, cluster.max_failures = {limit}, and no new checkpoint of stage {stage} between "
                f"them"
            )
        if why is not None:
            raise WorkerLost(
                f"{loss}; {why}; the newest checkpoint is kept: the same command continues from it"
            ) from loss
        with self._changing:
            failure = {"time": time.time(), "stage": stage, "what": str(loss)}
            self.folder.note(failures=self.folder.run().get("failures", 0) + 1, last_failure=failure)
        self.console.message(
            f"{loss}; starting the workers of stage {stage} again (failure {failures} of at most {limit} without a new "
            f"checkpoint between)"
        )

    def preempted(self, notice: Exception, stage: str, nodes: set[str]) -> None:
        """Count nodes that were taken away, once for all stages that leave them.

        Args:
            notice: what happened.
            stage: whose workers are to be moved.
            nodes: ids of those taken away; empty where they are not known.

        Raises:
            Preempted: that was once too often.
        """
        limit = self.config.cluster.max_preemptions
        with self._changing:
            if not nodes or not nodes <= self._taken:
                self.preemptions += 1
                self._taken |= nodes
                happened = {"time": time.time(), "stage": stage, "what": str(notice)}
                counted = self.folder.run().get("preemptions", 0) + 1
                self.folder.note(preemptions=counted, last_preemption=happened)
        if self.preemptions > limit:
            raise Preempted(
                f"{notice}; cluster.max_preemptions = {limit}; the newest checkpoint is kept: the same command "
                f"continues from it"
            ) from notice
        self.console.message(
            f"{notice}; moving stage {stage} to other nodes (preemption {self.preemptions} of at most {limit})"
        )

    def recovered(self, stage: str, seconds: dict[str, float], again: int) -> None:
        """Note how long a stage stood still, by what it waited for."""
        with self._changing:
            recovery = {"time": time.time(), "stage": stage, "steps_again": again, "seconds": seconds}
            self.folder.note(recoveries=[*self.folder.run().get("recoveries", []), recovery])
        spans = ", ".join(f"{name} {span:.1f}" for name, span in seconds.items() if name != "total")
        self.console.message(
            f"stage {stage} trains again after {seconds['total']:.1f} s ({spans}); {again} steps taken again"
        )




class Cost:
    """What a run has used, over all its starts; kept in run.json."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self._folder = folder
        self._per_worker = {"worker": 1.0, "cpu": config.cluster.cpus_per_worker or 0.0}
        self._per_worker["gpu"] = float(config.cluster.gpus_per_worker)
        self._earlier: dict[str, float] = folder.run().get("cost", {})
        self._workers, self._hours, self._since = 0, 0.0, time.monotonic()
        self._changing = threading.Lock()

    def change(self, workers: int) -> None:
        """So many workers more, or fewer, from now on."""
        with self._changing:
            self._count()
            self._workers += workers

    def _count(self) -> None:
        now = time.monotonic()
        self._hours += (now - self._since) / 3600 * self._workers
        self._since = now

    def note(self, **more: Any) -> None:
        """Write the hours used so far, with what else is to be noted."""
        with self._changing:
            self._count()
            cost = {
                f"{what}_hours": round(self._earlier.get(f"{what}_hours", 0.0) + self._hours * share, 4)
                for what, share in self._per_worker.items()
            }
        self._folder.note(cost=cost, **more)
