"""A run from its first word to its report: place the mesh, train stage by stage, survive deaths, evaluate, keep, tell.

    prepare   config -> run folder (lock, same config as before?)        `open_run`
    place     workers in a placement group, libraries loaded             `Fleet`
    train     intervals of steps between checkpoints and evaluations     `StageRun`
    finish    evaluation/*.json, export/*, report/*, table on stdout     `finish.py`

The driver decides when; workers decide what. Everything the driver writes can be written again after a crash: a
resumed run drops journal lines after its checkpoint and takes the same steps.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregation.metrics import Scores, groups_by_count, groups_by_index
from orchestration.checkpoint import Checkpoint, Checkpoints, DamagedCheckpoint, verify
from orchestration.compose import expand
from orchestration.config import RunConfig
from orchestration.console import Console
from orchestration.fleet import Fleet, WorkerLost, cluster, resolve_resources
from orchestration.journal import Journal
from orchestration.mesh import MeshShape, mesh_shape
from orchestration.run_folder import RunFolder
from orchestration.trainer import Interval

_INTERVAL_S = 1.0  # how often the driver hears from training


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written a checkpoint."""

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + signal_number


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        finished: all stages are trained; False when run.max_steps ended it.
        evaluations: "last" and "best".
        has_val: whether the data has a validation split.
    """

    finished: bool
    evaluations: dict[str, dict[str, Any]]
    checkpoint: Path


class StopSignals:
    """Notes SIGINT and SIGTERM for the next moment at which a checkpoint can be written. A second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[StopSignals]:
        old = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: a test, or a notebook
                old[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print(f"expertail: {signal.Signals(number).name}: stopping once a checkpoint is written", file=sys.stderr)


def run_path(config: RunConfig) -> Path:
    """The folder a config's run lives in, absolute: workers may have been started elsewhere."""
    return Path(os.path.abspath(expand(config.run.dir))) / config.run_name


def train(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    marks: dict[str, float],
    begin_tracking: Callable[[], None] = lambda: None,
) -> Outcome:
    """Carry out a run, or the rest of it.

    Args:
        config: checked.
        folder: the run's, held.
        console: told what happens.
        marks: unix seconds of the start so far, by what happened then; written to run.json after the first step.
        begin_tracking: called once, when workers, data and model are in place: a start refused before leaves no trace.

    Raises:
        ValueError, FloatingPointError: something an operator can change.
        WorkerLost: more workers died than cluster.max_failures.
        Stopped: on SIGINT or SIGTERM, after a checkpoint.
    """
    shape = mesh_shape(config.method.num_experts, config.cluster.workers, config.cluster.experts_per_worker)
    # Signals after the connection: Ray sets a SIGTERM handler of its own when it connects.
    with cluster(config.cluster.address), StopSignals().watched() as signals:
        marks["ray"] = time.time()
        config = _resolved(config, folder, shape)
        fleet = Fleet(config, shape)
        try:
            return Run(config, folder, console, fleet, signals, marks, begin_tracking).carry_out()
        finally:
            fleet.close()


def _resolved(config: RunConfig, folder: RunFolder, shape: MeshShape) -> RunConfig:
    """The config with CPUs and threads filled in, the same threads as at the first start, stored in the run folder."""
    engine = config.engine
    if folder.started and engine.threads is None:
        engine = engine.model_copy(update={"threads": folder.stored_config().engine.threads})
    cpus, threads = resolve_resources(config.cluster, engine, shape.workers)
    resolved = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"cpus_per_worker": cpus}),
            "engine": engine.model_copy(update={"threads": threads}),
        }
    )
    if folder.started:
        folder.check_same(resolved)
    folder.write(resolved)
    return resolved


class Run:
    """All stages of a run on one fleet, through deaths of its workers."""

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
        self.signals, self.marks, self.begin_tracking = signals, marks, begin_tracking
        self.stages = list(config.method.stages)
        self.checkpoints = Checkpoints(folder.path, self.stages)
        self.failures = 0
        self.cost = Cost(folder, config, fleet.shape.workers)

    def carry_out(self) -> Outcome:
        """Train from the newest checkpoint, or the beginning, to the end; again after each loss of a worker."""
        shape = self.fleet.shape
        start = self.fleet.start
        while True:
            try:
                start()
                self.marks.setdefault("libraries", time.time())
                self.folder.describe(
                    self.config,
                    self.fleet.hosts,
                    {"slots": shape.slots, "replicas": shape.replicas, "experts_per_worker": shape.experts_per_worker},
                )
                return self._stages()
            except WorkerLost as loss:
                self.failures += 1
                lost_at = time.time()
                if self.failures > self.config.cluster.max_failures:
                    raise WorkerLost(
                        f"{loss}; {self.failures} failures, cluster.max_failures = {self.config.cluster.max_failures}; "
                        f"the newest checkpoint is kept: the same command continues from it"
                    ) from loss
                self.console.message(
                    f"{loss}; starting the workers again (failure {self.failures} of at most "
                    f"{self.config.cluster.max_failures})"
                )
                self.folder.note(failures=self.failures, last_failure={"time": lost_at, "what": str(loss)})
                start = self.fleet.restart

    def _stages(self) -> Outcome:
        self.checkpoints.tidy(self.config.run.keep_checkpoints)
        newest = self.checkpoints.newest(self.console.message)
        first = self.stages.index(newest.state["stage"]) if newest else 0
        with Journal(self.folder.path) as journal:
            if newest:
                journal.rewind(self.stages, newest.state["stage"], newest.state["step"])
            elif (self.folder.path / "metrics.jsonl").exists():
                journal.rewind(self.stages, self.stages[0], 0)
            before = newest.state["before"] if newest else 0
            limit = self.config.run.max_steps
            outcome = None
            for name in self.stages[first:]:
                at_start = newest if newest and newest.state["stage"] == name else None
                weights = outcome.checkpoint if outcome else None
                stage = StageRun(self, name, at_start, journal, before=before, weights=weights)
                outcome = stage.carry_out()
                before += stage.total_steps
                if not outcome.finished or (limit is not None and before >= limit and name != self.stages[-1]):
                    outcome.finished = name == self.stages[-1] and outcome.finished
                    break
        assert outcome is not None
        return outcome


class Cost:
    """What a run has used, over all its starts; kept in run.json."""

    def __init__(self, folder: RunFolder, config: RunConfig, workers: int) -> None:
        self._folder, self._workers = folder, workers
        self._per_worker = {"worker": 1.0, "cpu": config.cluster.cpus_per_worker or 0.0}
        self._per_worker["gpu"] = float(config.cluster.gpus_per_worker)
        self._earlier: dict[str, float] = folder.run().get("cost", {})
        self._since = time.time()

    def note(self, **more: Any) -> None:
        """Write the hours used so far, with what else is to be noted."""
        hours = (time.time() - self._since) / 3600 * self._workers
        cost = {
            f"{what}_hours": round(self._earlier.get(f"{what}_hours", 0.0) + hours * share, 4)
            for what, share in self._per_worker.items()
        }
        self._folder.note(cost=cost, **more)


class StageRun:
    """One stage on a started fleet, from a checkpoint or from its beginning.

    Args:
        run: what it belongs to.
        stage: its name.
        newest: a checkpoint of this stage to go on from.
        journal: open.
        before: optimiser steps of the earlier stages.
        weights: checkpoint of the stage before, whose weights this one begins with.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        newest: Checkpoint | None,
        journal: Journal,
        *,
        before: int = 0,
        weights: Path | None = None,
    ) -> None:
        self.run, self.stage, self.journal = run, stage, journal
        self.config, self.fleet, self.folder = run.config, run.fleet, run.folder
        self.console, self.checkpoints = run.console, run.checkpoints
        self.epochs = self.config.method.stages[stage].epochs
        self.seen = self.fleet.build(stage)
        run.marks.setdefault("built", time.time())
        self.data = self._note_data()
        run.begin_tracking()
        self.before = before
        self.steps_per_epoch: int = self.seen[0]["steps_per_epoch"]
        self.total_steps = self.epochs * self.steps_per_epoch
        self.splits = ["val", "test"] if self.seen[0]["has_val"] else ["test"]
        select = self.config.run.select_on
        if select == "val" and "val" not in self.splits:
            raise ValueError(
                "run.select_on = val: this dataset has no validation split; set dataset.val_per_class (cut from the "
                "training pool), dataset.val_list, or run.select_on=test"
            )
        self.select_on = self.splits[0] if select == "auto" else select
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self._epoch_images, self._epoch_seconds = 0, 0.0
        self._pace = 0.0  # steps per second, as last seen
        if newest:
            self._go_on_from(newest)
        elif weights:
            self.fleet.call("start_from", str(weights))
            self.console.message(f"stage {stage} begins with the weights of {weights.name}")

    def _note_data(self) -> dict[str, Any]:
        seen = self.seen[0]
        cuts = self.config.dataset.index_groups

        def plain(groups: dict[str, Any]) -> dict[str, list[int]]:
            return {name: ids.tolist() for name, ids in groups.items()}

        data = {
            "dataset": self.config.dataset.name,
            "class_names": seen["class_names"],
            "counts": seen["counts"],
            "total": sum(seen["counts"]),
            "digest": seen["digest"],
            "image_shape": seen["image_shape"],
            "groups": {
                "by_count": plain(groups_by_count(seen["counts"])),
                "by_index": plain(groups_by_index(seen["counts"], cuts)) if cuts else None,
            },
        }
        self.folder.write_data(data)
        return data

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.fleet.call("load", str(checkpoint.folder), {"step": state["step"], "sums": state["sums"]})
        self.step, self.best, self.last = state["step"], state["best"], state["last"]
        if self.best and self.best["step"] == self.step:
            self.checkpoints.copy_weights(checkpoint.folder, self.best["checkpoint"])  # may have been cut off
        elif self.best:
            try:
                verify(self.checkpoints.folder / self.best["checkpoint"])
            except DamagedCheckpoint as problem:
                raise ValueError(
                    f"{problem}: the weights of the best evaluation (step {self.best['step']}) are damaged; needed "
                    f"them whole; restore them from a copy, or remove {self.checkpoints.folder} to train anew"
                ) from problem
        self.console.message(
            f"going on from {checkpoint.folder.name}: step {self.step} of {self.total_steps}, "
            f"epoch {min(self.step // self.steps_per_epoch + 1, self.epochs)} of {self.epochs}"
        )

    @property
    def target(self) -> int:
        """The step this start trains to."""
        limit = self.config.run.max_steps
        return self.total_steps if limit is None else min(max(limit - self.before, 0), self.total_steps)

    def take(self, steps: int) -> None:
        """Train this many steps, with everything that is due on the way."""
        target = self.step + steps
        while self.step < target:
            self._advance(target)

    def carry_out(self) -> Outcome:
        """Train to the target and make sure that the end is evaluated and saved."""
        self.take(self.target - self.step)
        if self.last is None or self.last["step"] != self.step:
            self._evaluate(count=False)
            self._save()
        best = self.best or self.last
        assert self.last is not None and best is not None
        evaluations = {"last": self.last["evaluation"], "best": best["evaluation"]}
        for name, evaluation in evaluations.items():
            self.folder.write_evaluation(name, evaluation)
        self.run.cost.note(peak_memory_gib=[round(gib, 2) for gib in self.fleet.call("peak_memory_gib")])
        newest = self.checkpoints.newest(self.console.message)
        assert newest is not None
        return Outcome(self.step >= self.total_steps, evaluations, newest.folder)

    def _advance(self, target: int) -> None:
        """Train one interval, note it, and do what is due at its end."""
        until = self._next_stop(target)
        first, before = self.step, time.monotonic()
        interval: Interval = self.fleet.call("train", until)[0]
        self.step = until
        self._pace = (until - first) / (time.monotonic() - before)
        self._note(first, interval)
        every = self.config.run.checkpoint_every_steps
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        evaluated = rest == 0 and (epoch % self.config.run.evaluate_every_epochs == 0 or epoch == self.epochs)
        if evaluated:
            self._evaluate(count=True)
        stop = self.run.signals.received
        if evaluated or self.step % every == 0 or stop is not None:
            self._save()
        if stop is not None:
            raise Stopped(
                stop,
                f"stopped after step {self.step} of {self.total_steps}; the same command continues from there",
            )

    def _next_stop(self, target: int) -> int:
        """The step of the next thing to do, at most an interval away."""
        every = self.config.run.checkpoint_every_steps
        due = min(
            target,
            (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch,
            (self.step // every + 1) * every,
        )
        return min(due, self.step + max(1, int(self._pace * _INTERVAL_S)))

    def _note(self, first: int, interval: Interval) -> None:
        if "first_step" not in self.run.marks:
            self.run.marks["first_step"] = time.time()
            self.folder.note(startup_s=_differences(self.run.marks))
        for step, loss in enumerate(interval.losses, first + 1):
            self.journal.append(self.stage, (step - 1) // self.steps_per_epoch + 1, step, {"train/loss": loss})
        self._epoch_images += interval.images
        self._epoch_seconds += interval.seconds
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        speed = interval.images / max(interval.seconds, 1e-9)
        if interval.epoch_means:
            means = {f"train/{'epoch_loss' if k == 'loss' else k}": v for k, v in interval.epoch_means.items()}
            pace = self._epoch_images / max(self._epoch_seconds, 1e-9)
            self.journal.append(
                self.stage, epoch, self.step, {**means, "train/lr": interval.lr, "train/images_per_s": pace}
            )
            self._epoch_images, self._epoch_seconds = 0, 0.0
        shown = {"loss": interval.losses[-1], "lr": interval.lr, "images/s": speed, **interval.terms}
        self.console.step(epoch, self.epochs, self.step, self.target, shown)

    def _evaluate(self, *, count: bool) -> None:
        """Score all splits. `count`: whether this may become the best; it must come at the same steps in every run."""
        epoch = max((self.step - 1) // self.steps_per_epoch + 1, 1)
        cuts = self.config.dataset.index_groups
        results = {}
        for split in self.splits:
            scores = Scores()
            for part in self.fleet.call("evaluate", split):
                if part is not None:
                    scores.merge(Scores.from_state(part))
            results[split] = scores.result(self.data["counts"], list(cuts) if cuts else None)
            self.journal.append(self.stage, epoch, self.step, _metrics(split, results[split]))
        self.journal.flush()
        evaluation = {
            "split": "test",
            "selected_on": self.select_on,
            "selected_value": results[self.select_on]["members"]["ensemble"]["top1"]["all"],
            "stage": self.stage,
            "epoch": epoch,
            "step": self.step,
            **results["test"],
        }
        self.last = {"step": self.step, "evaluation": evaluation}
        value = results[self.select_on]["members"]["ensemble"]["top1"]["all"]
        if count and (self.best is None or value > self.best["value"]):
            name = f"best-{self.checkpoints.name(self.stage, self.step)}"
            self.best = {"step": self.step, "value": value, "checkpoint": name, "evaluation": evaluation}
        self.console.evaluation(evaluation)

    def _save(self) -> None:
        """Write a checkpoint; when the evaluation just made is the best, keep its weights apart as well."""
        self.journal.flush(sync=True)
        writing = self.checkpoints.begin()
        answers = self.fleet.call("save", str(writing))
        entries = [entry for files, _ in answers for entry in files]
        state = {
            "stage": self.stage,
            "before": self.before,
            **answers[0][1],
            "best": self.best,
            "last": self.last,
        }
        folder = self.checkpoints.complete(writing, self.checkpoints.name(self.stage, self.step), entries, state)
        if self.best and self.best["step"] == self.step:
            self.checkpoints.copy_weights(folder, self.best["checkpoint"])
        self.checkpoints.tidy(self.config.run.keep_checkpoints)
        self.run.cost.note()


def _metrics(split: str, result: dict[str, Any]) -> dict[str, float]:
    """Metric names and values of an evaluation; groups without a class are left out."""
    values = {}
    for member, measured in result["members"].items():
        for group, top1 in measured["top1"].items():
            if top1 is not None:
                values[f"{split}/{member}/{group}/top1"] = top1
        for name in ("nll", "ece"):
            values[f"{split}/{member}/all/{name}"] = measured[name]
    return values


def _differences(marks: dict[str, float]) -> dict[str, float]:
    """Seconds between consecutive marks, and in all."""
    names = list(marks)
    spans = {b: round(marks[b] - marks[a], 2) for a, b in itertools.pairwise(names)}
    return spans | {"total": round(marks[names[-1]] - marks[names[0]], 2)}


def read_evaluations(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The evaluations a run folder holds, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((run_dir / "evaluation").glob("*.json"))}
