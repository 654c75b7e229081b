"""State that all stages of a run share: folder, journal, checkpoints, counts of failures and preemptions, cost."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestration.cluster.failures import WorkerLost
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.preemption import LeavingNodes, Preempted
from orchestration.config.recipe import ModelSource
from orchestration.config.run_config import RunConfig
from orchestration.runs.console import Console
from orchestration.runs.stopping import GivenUp, Stopped, StopSignals
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.exports import model_folder
from orchestration.storage.journal import Journal
from orchestration.storage.run_folder import RunFolder

_MEMORY_RESTARTS = 1  # a worker that is out of memory will most likely be so again


class Run:
    """The state that the stages of a run share while they train, some side by side in threads of their own.

    Args:
        config: with CPUs and threads resolved.
        folder: of the run, locked by this process.
        console: shows progress and messages.
        signals: that ask the run to stop.
        marks: unix seconds of the start so far, by what happened then.
        begin_tracking: called once there is something to send; may be called again.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        console: Console,
        signals: StopSignals,
        marks: dict[str, float],
        begin_tracking: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.folder, self.console = config, folder, console
        self.signals, self.marks, self._begin_tracking = signals, marks, begin_tracking
        self.checkpoints = Checkpoints(folder.path, list(config.method.stages))
        self.journal = Journal(folder.path)
        self.cost = Cost(folder, config)
        self.leaving_nodes = LeavingNodes()
        self.preemptions = 0
        self._preempted_nodes: set[str] = set()  # ids of nodes whose loss was counted
        self._messages: set[str] = set()  # shown by `message_once`
        self._workers: dict[int, list[dict[str, Any]]] = {}  # hosts and stages, by id of the fleet
        self._described = False  # whether run.json has the facts of this start
        self._models: dict[tuple[str | None, str], Path] = {}
        self._changing = threading.Lock()

    def raise_if_ending(self, stage: str) -> None:
        """Raise if the run is to end, before a stage is started or continued.

        Raises:
            Stopped: a signal has asked for it.
            GivenUp: a stage beside this one has failed.
        """
        if self.signals.received is not None:
            raise Stopped(
                self.signals.received,
                f"stopped before the workers of stage {stage} were started; the same command continues from its "
                f"newest checkpoint",
            )
        if self.signals.given_up.is_set():
            raise GivenUp(f"stage {stage}: its workers were not started any more")

    def raise_if_waiting_is_over(self, waited_s: float, awaited: Callable[[], str]) -> None:
        """Raise if the run is to end while a fleet of it waits for places; see `Fleet.reserve`."""
        if self.signals.received is not None:
            raise Stopped(self.signals.received, "stopped while it waited for places; the same command continues")
        if self.signals.given_up.is_set():
            raise GivenUp("no places were waited for any more")

    def model(self, source: ModelSource) -> Path:
        """Return the exported model of a source. A stage of this run is exported once, for all that ask."""
        asked = source.stage or source.run, source.export
        # Under the lock: stages side by side may share a teacher, and two would write one folder.
        with self._changing:
            if asked not in self._models:
                self._models[asked] = model_folder(self.config, self.folder, self.checkpoints, source)
            return self._models[asked]

    def begin_tracking(self) -> None:
        """Start the upload, once there is something to send."""
        with self._changing:
            self._begin_tracking()

    def announce_start(self, fleet: Fleet, stage: str) -> None:
        """Note in run.json which workers a stage has, once their libraries are loaded."""
        shape = fleet.shape
        with self._changing:
            self.marks.setdefault("libraries", time.time())
            self._workers[id(fleet)] = [host | {"stage": stage} for host in fleet.hosts]
            workers = [host for hosts in self._workers.values() for host in hosts]
            if self._described:
                self.folder.update_run(workers=workers)
                return
            self._described = True
            self.folder.record_start(
                self.config,
                workers,
                {"slots": shape.slots, "replicas": shape.replicas, "experts_per_worker": shape.experts_per_worker},
            )

    def forget(self, fleet: Fleet) -> None:
        """Leave the workers of a fleet that is about to be closed out of run.json."""
        with self._changing:
            self._workers.pop(id(fleet), None)

    def message_once(self, text: str) -> None:
        """Show a message, unless it was shown before: each start of a stage would repeat it."""
        with self._changing:
            is_new = text not in self._messages
            self._messages.add(text)
        if is_new:
            self.console.message(text)

    def record_failure(self, loss: WorkerLost, stage: str, in_a_row: Counter[str]) -> None:
        """Count a failure.

        Args:
            loss: what happened.
            stage: whose workers are to be started again.
            in_a_row: its failures since its newest checkpoint, this one included, by `WorkerLost.why`.

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
            self.folder.update_run(failures=self.folder.read_run().get("failures", 0) + 1, last_failure=failure)
        self.console.message(
            f"{loss}; starting the workers of stage {stage} again (failure {failures} of at most {limit} without a new "
            f"checkpoint between)"
        )

    def record_late_loss(self, loss: WorkerLost, stage: str) -> None:
        """Note a loss that came after a stage's last step: it costs no training, and counts against no limit."""
        with self._changing:
            noted = self.folder.read_run().get("losses_after_training", [])
            late = {"time": time.time(), "stage": stage, "what": str(loss)}
            self.folder.update_run(losses_after_training=[*noted, late])

    def record_preemption(self, notice: Exception, stage: str, nodes: set[str]) -> None:
        """Count nodes that were taken away, once for all stages that leave them.

        Args:
            notice: what happened.
            stage: whose workers are to be moved.
            nodes: ids of those taken away; empty where they are not known.

        Raises:
            Preempted: that was more often than cluster.max_preemptions.
        """
        limit = self.config.cluster.max_preemptions
        with self._changing:
            # A node under several stages is noticed by each of them, and taken away once.
            if not nodes or not nodes <= self._preempted_nodes:
                self.preemptions += 1
                self._preempted_nodes |= nodes
                happened = {"time": time.time(), "stage": stage, "what": str(notice)}
                counted = self.folder.read_run().get("preemptions", 0) + 1
                self.folder.update_run(preemptions=counted, last_preemption=happened)
        if self.preemptions > limit:
            raise Preempted(
                f"{notice}; cluster.max_preemptions = {limit}; the newest checkpoint is kept: the same command "
                f"continues from it"
            ) from notice
        self.console.message(
            f"{notice}; moving stage {stage} to other nodes (preemption {self.preemptions} of at most {limit})"
        )

    def record_predictions(self, stage: str, failure: str | None) -> None:
        """Note why the predictions of a stage are not kept, or that they are."""
        with self._changing:
            noted = self.folder.read_run().get("predictions", {})
            if failure is not None or stage in noted:
                others = {name: note for name, note in noted.items() if name != stage}
                mine = {} if failure is None else {stage: {"status": "failed", "cause": failure}}
                self.folder.update_run(predictions=others | mine)

    def record_recovery(self, stage: str, seconds: dict[str, float], again: int) -> None:
        """Note how long a stage stood still after a loss.

        Args:
            stage: its name.
            seconds: by what was waited for, and in all.
            again: steps that were taken again.
        """
        with self._changing:
            recovery = {"time": time.time(), "stage": stage, "steps_again": again, "seconds": seconds}
            self.folder.update_run(recoveries=[*self.folder.read_run().get("recoveries", []), recovery])
        spans = ", ".join(f"{name} {span:.1f}" for name, span in seconds.items() if name != "total")
        self.console.message(
            f"stage {stage} trains again after {seconds['total']:.1f} s ({spans}); {again} steps taken again"
        )


class Cost:
    """The hours that a run has used, over all its starts; kept in run.json."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self._folder = folder
        self._per_worker = {"worker": 1.0, "cpu": config.cluster.cpus_per_worker or 0.0}
        self._per_worker["gpu"] = float(config.cluster.gpus_per_worker)
        self._earlier: dict[str, float] = folder.read_run().get("cost", {})
        self._workers, self._hours, self._since = 0, 0.0, time.monotonic()
        self._changing = threading.Lock()

    def change(self, workers: int) -> None:
        """Count more workers from now on, or fewer if the number is negative."""
        with self._changing:
            self._count()
            self._workers += workers

    def _count(self) -> None:
        """Add the hours since the last change at the number of workers until now."""
        now = time.monotonic()
        self._hours += (now - self._since) / 3600 * self._workers
        self._since = now

    def write(self, **more: Any) -> None:
        """Write the hours used so far to run.json, with other keys."""
        with self._changing:
            self._count()
            cost = {
                f"{what}_hours": round(self._earlier.get(f"{what}_hours", 0.0) + self._hours * share, 4)
                for what, share in self._per_worker.items()
            }
        self._folder.update_run(cost=cost, **more)
