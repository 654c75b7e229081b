"""One fleet that trains one stage after another, through the loss of workers and of nodes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from orchestration.cluster.failures import WorkerLost
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.hangs import keep_stacks
from orchestration.cluster.preemption import Drained, Preempted
from orchestration.runs.console import Console
from orchestration.runs.pause import Pause
from orchestration.runs.run import Run
from orchestration.runs.stage_run import StageRun
from orchestration.runs.stopping import Outcome
from orchestration.storage.files import LOCK

_WAITS_FOR_NODES = 10  # times cluster.placement_timeout_s: how long a restart waits for a node that was lost
_RAY_NOTICES_S = 120.0  # by default it counts a node that vanished as dead after about 65 s


class Supervisor:
    """One fleet that trains one stage after another; a worker's death costs the steps since its stage's checkpoint."""

    def __init__(self, run: Run, fleet: Fleet, console: Console) -> None:
        self._run, self._fleet, self._console = run, fleet, console

    def carry_out(self, stage: str, before: int) -> Outcome:
        """Train a stage from its newest checkpoint, or its beginning, to its end; again after each loss of a worker."""
        run, fleet = self._run, self._fleet
        in_a_row: Counter[str] = Counter()
        reached = -1
        pause: Pause | None = None
        training: StageRun | None = None
        while True:
            run.check_wanted(stage)
            try:
                if not fleet.workers:
                    self._start()
                elif pause is not None:
                    fleet.mend()
                    self._check_shared()
                if pause is not None:
                    self._wait(stage, self._link)
                run.announce_start(fleet, stage)
                if pause is not None:
                    pause.mark("workers")
                training = StageRun(run, stage, fleet, self._console, before=before, pause=pause)
                fleet.keep_spares()
                return training.carry_out()
            except Drained as notice:
                pause = _open_pause(pause, training)
                run.record_preemption(notice, stage, fleet.leaving_nodes())
                self._move(stage, notice)
            except WorkerLost as loss:
                pause = _open_pause(pause, training)
                if loss.why == "hang":
                    self._console.message(keep_stacks(fleet.workers, fleet.hosts, run.folder.path / "hangs"))
                run.check_wanted(stage)
                if loss.why == "preemption":
                    run.record_preemption(loss, stage, fleet.leaving_nodes())
                    self._move(stage, loss)
                    continue
                newest = run.checkpoints.newest(stage, self._console.message)
                now = newest.state["step"] if newest else 0
                if now > reached:
                    in_a_row.clear()
                in_a_row[loss.why] += 1
                reached = now
                if loss.why != "failure" or in_a_row.total() > 1:  # what hangs or is full does not survive
                    self._end_workers()
                run.record_failure(loss, stage, in_a_row)
                self._await_word(stage)
                self._wait(stage, fleet.check_room)

    def _start(self) -> None:
        self._run.cost.change(self._fleet.shape.workers)
        self._fleet.start()
        self._check_shared()

    def _end_workers(self) -> None:
        self._run.cost.change(-len(self._fleet.workers))
        self._fleet.kill()

    def _move(self, stage: str, notice: Exception) -> None:
        """Leave nodes that are taken away.

        Raises:
            Preempted: no other has room, and none has come.
        """
        self._end_workers()
        try:
            self._wait(stage, self._fleet.move)
        except ValueError as reason:
            raise Preempted(
                f"{notice}; {reason}; the newest checkpoint is kept: the same command continues from it"
            ) from reason

    def _check_shared(self) -> None:
        """Refuse workers that do not see the run folder they are to write to.

        Raises:
            ValueError: names the first node that sees another one.
        """
        folder, fleet = self._run.folder, self._fleet
        if not folder.shared:
            return
        for host, seen in zip(fleet.hosts, fleet.call("sees", str(folder.path / LOCK), folder.token), strict=True):
            if not seen:
                raise ValueError(
                    f"run.dir = {folder.path.parent}: node {host['node']} does not see this run's folder there; "
                    f"needed a folder on storage that all nodes share, at the same path on each, or a URL; set run.dir"
                )

    def _link(self) -> None:
        """See that the workers reach one another, on other nodes if need be.

        Raises:
            ValueError: two nodes do not reach each other, and there is no room without one of them.
            WorkerLost: as `Fleet.call`.
        """
        fleet = self._fleet
        while True:
            if not fleet.workers:  # no places were found at the last look
                fleet.move()
                self._start()
            if (cut := fleet.cut()) is None:
                return
            one, other = map(fleet.address_of, cut)
            text = f"nodes {one} and {other} do not reach each other, though Ray reaches both"
            try:
                fleet.avoid(cut[1])
            except ValueError as reason:
                raise ValueError(
                    f"{text}; needed them to, or room elsewhere: {reason}, or mend the network between the two; the "
                    f"newest checkpoint is kept: the same command continues from it"
                ) from reason
            self._console.message(f"{text}; starting the workers on other nodes than {other}")
            self._end_workers()

    def _await_word(self, stage: str) -> None:
        """Wait until every node under the fleet answers, or Ray counts those that do not as dead.

        A worker started on one before that would be the next to be lost.
        """
        end, told = time.monotonic() + _RAY_NOTICES_S, False
        while (silent := self._fleet.silent_nodes()) and time.monotonic() < end:
            if not told:
                self._console.message(f"{', '.join(silent)} does not answer; waiting until it does, or Ray gives it up")
                told = True
            self._run.check_wanted(stage)
            time.sleep(0.5)

    def _wait(self, stage: str, for_room: Callable[[], None]) -> None:
        """Wait a while for a node that was lost with its workers.

        Raises:
            ValueError: it has not come back, nor another.
        """
        wait_s = _WAITS_FOR_NODES * self._run.config.cluster.placement_timeout_s
        end, told = time.monotonic() + wait_s, False
        while True:
            try:
                return for_room()
            except ValueError as reason:
                if time.monotonic() >= end:
                    raise
                if not told:
                    self._console.message(f"{reason}; waiting up to {wait_s:g} s for a node")
                    told = True
            self._run.check_wanted(stage)
            time.sleep(min(1.0, wait_s / 10))


def _open_pause(pause: Pause | None, training: StageRun | None) -> Pause:
    """The pause that a loss begins, or the one that it falls into."""
    return Pause(training.step if training is not None else 0) if pause is None or pause.over else pause
