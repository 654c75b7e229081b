"""Carry out a run, from its admitted config to its last stage: place workers, train wave after wave of stages.

admit     config -> mesh, or a refusal before anything starts        `admit`
prepare   connect to Ray, run folder (same config as before?)        `train`
place     workers in placement groups, libraries loaded              `Fleet`
train     each stage on a fleet, some side by side                   `Driver`, `Supervisor`, `StageRun`
finish    evaluation/*.json, export/*, report/*, table on stdout     `commands/train.py`
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from orchestration.cluster.connection import cluster, node_resources
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.placement import NoRoom, placement_wait_s
from orchestration.config.late import late_notes
from orchestration.runs.admission import Admission
from orchestration.runs.console import Console
from orchestration.runs.kept_predictions import predictions_missing
from orchestration.runs.run import Run
from orchestration.runs.stage_run import write_evaluations
from orchestration.runs.stopping import GivenUp, Outcome, Stopped, StopSignals
from orchestration.runs.supervisor import Supervisor
from orchestration.runs.waiting import Waiting
from orchestration.storage.location import is_submitted_job
from orchestration.storage.run_folder import RunFolder


def train(
    admitted: Admission,
    folder: RunFolder,
    console: Console,
    marks: dict[str, float],
    begin_tracking: Callable[[], None] = lambda: None,
) -> Outcome:
    """Carry out a run, or the rest of it.

    Args:
        admitted: the run, which `admit` let pass.
        folder: of the run, locked by this process.
        console: shows progress and messages.
        marks: unix seconds of the start so far, by what happened then; written to run.json after the first step.
        begin_tracking: called once, when workers, data and model are in place: a start refused before leaves no trace.
            A run that has to wait for its places calls it as the wait begins.

    Raises:
        ValueError, FloatingPointError: something an operator can change.
        WorkerLost: a stage's workers died more often than cluster.max_failures without a new checkpoint between.
        Stopped: on a signal that asks for it, after a checkpoint.
        Preempted: nodes were taken away, after a checkpoint, and there is no room left.
    """
    # Signals after the connection: Ray sets a SIGTERM handler of its own when it connects.
    with cluster(admitted.config.cluster.address), StopSignals().watch() as signals:
        marks["ray"] = time.time()
        stored = folder.stored_config() if folder.started else None
        # The number of threads changes the last bits of a result: a run keeps that of its first start.
        admitted = admitted.on(node_resources(), stored.engine.threads if stored is not None else None)
        config = admitted.config
        if folder.started:
            folder.check_same_config(config)
        folder.write_config(config)
        if admitted.placement:
            folder.update_run(placement=dict(admitted.placement))
        if late := list(late_notes(config.method)):
            folder.update_run(never_reached=late)
        for note in late:
            console.message(note)
        run = Run(config, folder, console, signals, marks, begin_tracking)
        fleet = Fleet(config, admitted.shape, run.raise_if_waiting_is_over)
        try:
            wait_s = placement_wait_s(config.cluster, job=is_submitted_job())
            fleet.reserve(wait_s, Waiting(run, wait_s))
            outcome = Driver(run, fleet).carry_out()
            outcome.signal = signals.received
            fleet.hand_on()
            return outcome
        finally:
            fleet.close()


class Driver:
    """Trains the stages of a run wave after wave; the stages of a wave do not wait for each other.

    Args:
        run: what its stages share.
        fleet: the run's first; it serves every stage that trains alone.
    """

    def __init__(self, run: Run, fleet: Fleet) -> None:
        self.run, self.fleet = run, fleet

    def carry_out(self) -> Outcome:
        """Train every stage from its newest checkpoint, or its beginning, to its end. Return how the last one ended."""
        self.run.checkpoints.clean()  # what a killed start left; no worker of this one writes yet
        limit, before = self.run.config.run.max_steps, 0
        ended: dict[str, Outcome] = {}
        with self.run.journal:
            for wave in self.run.config.method.waves():
                outcomes = self._train_wave(wave, before)
                ended |= {outcome.stage: outcome for outcome in outcomes}
                before += sum(outcome.total_steps for outcome in outcomes)
                if not all(o.finished for o in outcomes) or (limit is not None and before >= limit):
                    break
        self.run.checkpoints.clean()  # a worker that died while it wrote left a folder half-written

        # Of stages side by side, the limit may cut some and let others end, the last one too.
        stages = self.run.checkpoints.stages
        last = ended.get(stages[-1], outcomes[-1])
        last.cut = tuple(stage for stage in stages if stage not in ended or not ended[stage].finished)
        last.finished = not last.cut
        if last.finished and (newest := self.run.checkpoints.newest(last.stage, self.run.console.message)) is not None:
            # Again: a stage of no final result, side by side with the last one or after it, may have written its own.
            write_evaluations(self.run.folder, self.run.config, last.stage, newest.state)
        return last

    def _train_wave(self, stages: list[str], before: int) -> list[Outcome]:
        """Train stages side by side as far as the cluster has places.

        Args:
            stages: that do not wait for each other.
            before: optimiser steps of earlier waves.
        """
        # The last stage of a run is begun again even if it is trained: its evaluations may not have been written.
        last = self.run.checkpoints.stages[-1]
        done = {stage: None if stage == last else self._finished(stage) for stage in stages}
        left = [stage for stage in stages if done[stage] is None]
        fleets = self._fleets(len(left))
        try:
            if len(left) == 1:
                done[left[0]] = Supervisor(self.run, self.fleet, self.run.console, left[0], before).carry_out()
            elif left:
                done |= self._train_side_by_side(left, fleets, before)
        finally:
            for fleet in fleets[1:]:  # the first is the run's own, for the next wave
                self.run.cost.change(-len(fleet.workers))
                self.run.forget(fleet)
                fleet.close()
        return [outcome for outcome in done.values() if outcome is not None]

    def _finished(self, stage: str) -> Outcome | None:
        """Return how a stage ended at an earlier start, None if it did not. Write what that start was killed before."""
        newest = self.run.checkpoints.newest_finished(stage, self.run.console.message)
        if newest is None or predictions_missing(self.run.folder, self.run.config, stage):
            return None  # begun again, a trained stage takes no step

        # That start may have been killed between the checkpoint and the copy of its weights as the best.
        best = newest.state["best"]
        if (
            best
            and best["step"] == newest.state["step"]
            and not (self.run.checkpoints.folder / best["checkpoint"]).exists()
        ):
            self.run.checkpoints.copy_weights(newest.folder, best["checkpoint"])
        method = self.run.config.method
        if method.stages[stage].classes is not None or stage in method.finals:
            write_evaluations(self.run.folder, self.run.config, stage, newest.state)
        return Outcome(stage, True, newest.state["total_steps"], newest.folder)

    def _fleets(self, wanted: int) -> list[Fleet]:
        """Return the run's fleet, and further ones as far as there are places now."""
        fleets = [self.fleet]
        wanted = min(wanted, self.run.config.side_by_side)
        while len(fleets) < wanted:
            fleet = Fleet(self.run.config, self.fleet.shape, self.run.raise_if_waiting_is_over)
            try:
                fleet.reserve()
            except NoRoom as reason:
                self.run.console.message(f"{len(fleets)} of {wanted} stages train side by side: {reason}")
                break
            fleets.append(fleet)
        return fleets

    def _train_side_by_side(self, stages: list[str], fleets: list[Fleet], before: int) -> dict[str, Outcome]:
        """Train stages on several fleets. A fleet that is free takes the next stage; the first failure ends all."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for stage in stages:
            waiting.put(stage)
        outcomes: dict[str, Outcome] = {}

        def work(fleet: Fleet) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    stage = waiting.get_nowait()
                    supervisor = Supervisor(self.run, fleet, self.run.console.labelled(stage), stage, before)
                    try:
                        outcomes[stage] = supervisor.carry_out()
                    except BaseException:  # stages beside this one look at `given_up` after every interval
                        self.run.signals.given_up.set()
                        raise

        with ThreadPoolExecutor(len(fleets), thread_name_prefix="stage") as threads:
            working = [threads.submit(work, fleet) for fleet in fleets]
            # All are waited for, failed or not: each of them writes a checkpoint before it ends.
            try:
                errors = [future.exception() for future in working]
            except BaseException:  # a second Ctrl-C: nobody waits for checkpoints any more
                self.run.signals.given_up.set()
                for fleet in fleets:  # else leaving the pool would wait for calls that go on
                    fleet.kill()
                raise

        # The cause first: a stage that was stopped, or gave up because another failed, has less to say.
        problems = [error for error in errors if error is not None]
        problems.sort(key=lambda error: isinstance(error, Stopped) + 2 * isinstance(error, GivenUp))
        for problem in problems[1:]:
            self.run.console.message(str(problem))
        for problem in problems[:1]:
            raise problem
        return outcomes
