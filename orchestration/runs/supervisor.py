"""Train one stage on one fleet, through the loss of workers and of nodes.

A stage is in one of four states. A loss ends the state that it falls into:

    starting   create the workers, or replace the lost ones; see that they find the run folder
               and, after a loss, reach each other                                        -> training
    training   build the stage on the workers, take its steps                             -> done
    waiting    until all nodes answer, or Ray counts those that do not as dead; for room  -> starting
    moving     end the workers, reserve places on nodes that stay                         -> starting

    in any     nodes will be, or were, taken away: count the preemption                   -> moving
               a worker died or hangs: count the failure, give up after too many          -> waiting
               the run is to end, or something an operator can change                     -> raised

After its last step a stage is no longer lost with its workers. The loss is noted in run.json and counts as no failure;
new workers are asked once more for the stage's predictions, which are then given up.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable

from orchestration.cluster.failures import WorkerLost
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.hangs import write_stacks
from orchestration.cluster.placement import NoRoom, restart_wait_s
from orchestration.cluster.preemption import Preempted, PreemptionNotice
from orchestration.cluster.reachability import Disconnected
from orchestration.runs.console import Console
from orchestration.runs.kept_predictions import give_up_predictions, keep_predictions, keeps_predictions
from orchestration.runs.pause import Pause
from orchestration.runs.run import Run
from orchestration.runs.stage_run import StageRun
from orchestration.runs.stopping import GivenUp, Outcome, Stopped
from orchestration.storage.files import LOCK

_ASK_AGAIN_S = 0.5  # nodes that did not answer
_RAY_NOTICES_S = 120.0  # by default Ray counts a node that vanished as dead after about 65 s


class State(enum.Enum):
    """See the head of this file."""

    STARTING = enum.auto()
    TRAINING = enum.auto()
    WAITING = enum.auto()
    MOVING = enum.auto()


class Supervisor:
    """Trains one stage on one fleet. A worker's death costs the steps since the stage's newest checkpoint.

    Args:
        run: which the stage belongs to.
        fleet: with places reserved, started or not.
        console: shows progress and messages of the stage.
        stage: its name.
        before: optimiser steps of the stages that came before.
    """

    def __init__(self, run: Run, fleet: Fleet, console: Console, stage: str, before: int = 0) -> None:
        self._run, self._fleet, self._console = run, fleet, console
        fleet.report = console.message
        self._stage, self._before = stage, before
        self._stage_run: StageRun | None = None
        self._pause: Pause | None = None  # since the last loss, until the step after it
        self._notice: Exception | None = None  # why the fleet moves
        self._failures: Counter[str] = Counter()  # since the newest checkpoint, by `WorkerLost.why`
        self._newest_step = -1  # of that checkpoint

    def carry_out(self) -> Outcome:
        """Train the stage from its newest checkpoint, or its beginning, to its end, and keep its predictions.

        Raises:
            Stopped, GivenUp: the run is to end.
            Preempted: nodes were taken away too often, or there is no room on others.
            WorkerLost: there were too many failures without a new checkpoint between.
            ValueError, FloatingPointError: something an operator can change.
        """
        outcome = self._train_through_losses()
        self._note_memory()  # before the predictions: workers that are started for them have never trained
        if outcome.finished and keeps_predictions(self._run.config, self._stage):
            self._keep_predictions()
            self._run.cost.write()  # with the time that they took
        return outcome

    def _train_through_losses(self) -> Outcome:
        state = State.STARTING
        while True:
            # A loss can fall into every state: a worker may die while it is started, and a node while it is waited for.
            try:
                match state:
                    case State.STARTING:
                        self._start()
                        state = State.TRAINING
                    case State.TRAINING:
                        return self._train()
                    case State.WAITING:
                        self._wait_for_nodes()
                        state = State.STARTING
                    case State.MOVING:
                        self._move()
                        state = State.STARTING
            except PreemptionNotice as notice:
                self._begin_pause()
                state = self._record_preemption(notice)
            except WorkerLost as loss:
                self._begin_pause()
                state = self._record_loss(loss)

    # States

    def _start(self) -> None:
        run, fleet = self._run, self._fleet
        run.raise_if_ending(self._stage)
        if not fleet.workers:
            run.cost.change(fleet.shape.workers)  # before the start, which takes seconds that are paid for
            fleet.start()
            self._check_run_folder()
        elif self._pause is not None:
            fleet.replace_lost()
            self._check_run_folder()
        if self._pause is not None:  # at the first start a broken network is found by the first exchange
            self._wait_for_network()
        run.announce_start(fleet, self._stage)
        for crowded in fleet.crowded_nodes():
            run.message_once(crowded)
        if self._pause is not None:
            self._pause.mark("workers")

    def _train(self) -> Outcome:
        self._stage_run = StageRun(
            self._run, self._stage, self._fleet, self._console, before=self._before, pause=self._pause
        )
        self._stage_run.prepare()
        self._fleet.keep_spares()  # after `prepare`, which finds out which images they leave out
        return self._stage_run.carry_out()

    def _wait_for_nodes(self) -> None:
        self._wait_for_answers()
        self._retry(self._fleet.check_room, NoRoom, "a node")

    def _move(self) -> None:
        """Leave nodes that are taken away.

        Raises:
            Preempted: no other node has room, and none has come.
        """
        self._end_workers()
        try:
            self._retry(self._fleet.move, NoRoom, "a node")
        except NoRoom as reason:
            raise Preempted(
                f"{self._notice}; {reason}; the newest checkpoint is kept: the same command continues from it"
            ) from reason

    # After the last step

    def _keep_predictions(self) -> None:
        assert self._stage_run is not None
        if self._fleet.workers:  # else one was lost when it was asked for its memory
            try:
                return keep_predictions(self._stage_run)
            except WorkerLost as loss:
                self._run.record_late_loss(loss, self._stage)
                self._console.message(f"{loss}; stage {self._stage} is trained; asking new workers for its predictions")
            self._end_workers()
        self._begin_pause()
        try:
            self._wait_for_answers()
            self._fleet.check_room()
            self._start()
            self._stage_run = StageRun(self._run, self._stage, self._fleet, self._console, before=self._before)
            self._stage_run.prepare()
            keep_predictions(self._stage_run)
        except (Stopped, GivenUp):
            raise
        except Exception as problem:
            if isinstance(problem, WorkerLost):
                self._run.record_late_loss(problem, self._stage)
            self._end_workers()
            give_up_predictions(self._run, self._stage, problem)

    def _note_memory(self) -> None:
        if self._fleet.workers and self._stage_run is not None:
            try:
                self._stage_run.note_memory()
            except WorkerLost as loss:
                self._run.record_late_loss(loss, self._stage)
                self._console.message(f"stage {self._stage} is trained; its peak memory is not noted: {loss}")
                self._end_workers()

    # Losses

    def _begin_pause(self) -> None:
        """Begin to measure the time that the stage stands still, unless a loss falls into an earlier pause."""
        if self._pause is None or self._pause.over:
            self._pause = Pause(self._stage_run.step if self._stage_run is not None else 0)

    def _record_preemption(self, notice: Exception) -> State:
        self._run.record_preemption(notice, self._stage, self._fleet.leaving_nodes())
        self._notice = notice
        return State.MOVING

    def _record_loss(self, loss: WorkerLost) -> State:
        run, fleet = self._run, self._fleet
        if loss.why == "hang":
            self._console.message(write_stacks(fleet.workers, fleet.hosts, run.folder.path / "hangs"))
        run.raise_if_ending(self._stage)
        if loss.why == "preemption":
            return self._record_preemption(loss)

        # A new checkpoint since the last failure means that the stage makes progress: count from one again.
        newest = run.checkpoints.newest(self._stage, self._console.message)
        step = newest.state["step"] if newest else 0
        if step > self._newest_step:
            self._failures.clear()
        self._failures[loss.why] += 1
        self._newest_step = step

        # Survivors are kept after a first death only: a mesh that hung, or is out of memory, does not give up its step.
        if loss.why != "failure" or self._failures.total() > 1:
            self._end_workers()
        run.record_failure(loss, self._stage, self._failures)
        return State.WAITING

    def _end_workers(self) -> None:
        self._run.cost.change(-len(self._fleet.workers))
        self._fleet.kill()

    # Checks and waits

    def _check_run_folder(self) -> None:
        """Refuse workers that do not see the run folder they are to write to.

        Raises:
            ValueError: names the first node that sees another folder, or none.
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

    def _check_network(self) -> None:
        """Refuse workers that do not reach each other.

        Raises:
            Disconnected: names two nodes.
            WorkerLost: as `Fleet.call`.
        """
        if (pair := self._fleet.disconnected_nodes()) is not None:
            # Ray's head reaches both, so Ray replaces neither; their exchanges would hang.
            raise Disconnected(f"nodes {pair[0]} and {pair[1]} do not reach each other, though Ray reaches both")

    def _wait_for_network(self) -> None:
        """Wait until the workers reach each other: a switch that restarts need not end a run.

        Raises:
            ValueError: two nodes still do not; names both.
            WorkerLost: as `Fleet.call`.
        """
        try:
            self._retry(self._check_network, Disconnected, "the network")
        except Disconnected as problem:
            raise ValueError(
                f"{problem}; needed every node to reach every other; mend the network between the two, or keep one of "
                f"them out of the cluster; the newest checkpoint is kept: the same command continues from it"
            ) from problem

    def _wait_for_answers(self) -> None:
        """Wait until every node under the fleet answers, or Ray counts those that do not as dead.

        A worker that is started on such a node before that would be lost next.
        """
        end, announced = time.monotonic() + _RAY_NOTICES_S, False
        while (nodes := self._fleet.unreachable_nodes()) and time.monotonic() < end:
            if not announced:
                self._console.message(f"{', '.join(nodes)} does not answer; waiting until it does, or Ray gives it up")
                announced = True
            self._run.raise_if_ending(self._stage)
            time.sleep(_ASK_AGAIN_S)

    def _retry(self, attempt: Callable[[], None], problem: type[ValueError], awaited: str) -> None:
        """Try until there is no problem, for a while. Other errors are raised at once.

        Args:
            attempt: raises `problem` when it is too early.
            problem: the error to try again after.
            awaited: what may end the problem, in words.

        Raises:
            ValueError: the problem lasted.
            Stopped, GivenUp: the run is to end.
        """
        wait_s = restart_wait_s(self._run.config.cluster)
        end, announced = time.monotonic() + wait_s, False
        while True:
            try:
                return attempt()
            except problem as reason:
                if time.monotonic() >= end:
                    raise
                if not announced:
                    self._console.message(f"{reason}; waiting up to {wait_s:g} s for {awaited}")
                    announced = True
            self._run.raise_if_ending(self._stage)
            time.sleep(min(1.0, wait_s / 10))
