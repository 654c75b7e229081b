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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregation.metrics import Scores, groups_by_count, groups_by_index
from orchestration.checkpoint import Checkpoint, Checkpoints
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


def run_path(config: RunConfig) -> Path:
    """The folder a config's run lives in, absolute: workers may have been started elsewhere."""
    return Path(os.path.abspath(expand(config.run.dir))) / config.run_name


def train(config: RunConfig, folder: RunFolder, console: Console, marks: dict[str, float]) -> Outcome:
    """Carry out a run, or the rest of it.

    Args:
        config: checked.
        folder: the run's, held.
        console: told what happens.
        marks: unix seconds of the start so far, by what happened then; written to run.json after the first step.

    Raises:
        ValueError, FloatingPointError: something an operator can change.
        WorkerLost: more workers died than cluster.max_failures.
        Stopped: on SIGINT or SIGTERM, after a checkpoint.
    """
    shape = mesh_shape(config.method.num_experts, config.cluster.workers, config.cluster.experts_per_worker)
    with StopSignals().watched() as signals, cluster(config.cluster.address):
        marks["ray"] = time.time()
        config = _resolved(config, folder, shape)
        fleet = Fleet(config, shape)
        try:
            return _Run(config, folder, console, fleet, signals, marks).carry_out()
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


class _Run:
    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        console: Console,
        fleet: Fleet,
        signals: StopSignals,
        marks: dict[str, float],
    ) -> None:
        self.config, self.folder, self.console, self.fleet = config, folder, console, fleet
        self.signals, self.marks = signals, marks
        self.stages = list(config.method.stages)
        self.checkpoints = Checkpoints(folder.path, self.stages)
        self.failures = 0

    def carry_out(self) -> Outcome:
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
            outcome = None
            for name in self.stages[first:]:
                at_start = newest if newest and newest.state["stage"] == name else None
                outcome = StageRun(self, name, at_start, journal).carry_out()
                if not outcome.finished:
                    break
        assert outcome is not None
        return outcome


class StageRun:
    """One stage on a started fleet, from a checkpoint or from its beginning."""

    def __init__(self, run: _Run, stage: str, newest: Checkpoint | None, journal: Journal) -> None:
        self.run, self.stage, self.journal = run, stage, journal
        self.config, self.fleet, self.folder = run.config, run.fleet, run.folder
        self.console, self.checkpoints = run.console, run.checkpoints
        self.epochs = self.config.method.stages[stage].epochs
        self.seen = self.fleet.build(stage)
        run.marks.setdefault("built", time.time())
        self.data = self._note_data()
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
        if self.best and not (self.checkpoints.folder / self.best["checkpoint"]).is_dir():
            if self.best["step"] != self.step:
                raise ValueError(
                    f"{self.checkpoints.folder / self.best['checkpoint']}: the weights of the best evaluation are "
                    f"missing; needed a folder; restore it, or remove {self.checkpoints.folder} to train anew"
                )
            self.checkpoints.copy_weights(checkpoint.folder, self.best["checkpoint"])
        self.console.message(
            f"going on from {checkpoint.folder.name}: step {self.step} of {self.total_steps}, "
            f"epoch {min(self.step // self.steps_per_epoch + 1, self.epochs)} of {self.epochs}"
        )

    @property
    def target(self) -> int:
        """The step this start trains to."""
        limit = self.config.run.max_steps
        return self.total_steps if limit is None else min(limit, self.total_steps)

    def carry_out(self) -> Outcome:
        while self.step < self.target:
            self._advance()
        if self.last is None or self.last["step"] != self.step:
            self._evaluate(count=False)
            self._save()
        best = self.best or self.last
        assert self.last is not None and best is not None
        evaluations = {"last": self.last["evaluation"], "best": best["evaluation"]}
        for name, evaluation in evaluations.items():
            self.folder.write_evaluation(name, evaluation)
        self._note_cost()
        newest = self.checkpoints.newest(self.console.message)
        assert newest is not None
        return Outcome(self.step >= self.total_steps, evaluations, newest.folder)

    def _note_cost(self) -> None:
        """Add what this start used to run.json."""
        seconds = time.time() - self.run.marks["ray"]
        old = self.folder.run().get("cost", {"worker_hours": 0.0, "cpu_hours": 0.0, "gpu_hours": 0.0})
        hours = seconds / 3600 * self.fleet.shape.workers
        cluster_config = self.config.cluster
        self.folder.note(
            cost={
                "worker_hours": round(old["worker_hours"] + hours, 4),
                "cpu_hours": round(old["cpu_hours"] + hours * (cluster_config.cpus_per_worker or 0.0), 4),
                "gpu_hours": round(old["gpu_hours"] + hours * cluster_config.gpus_per_worker, 4),
            },
            peak_memory_gib=[round(gib, 2) for gib in self.fleet.call("peak_memory_gib")],
        )

    def _advance(self) -> None:
        """Train one interval, note it, and do what is due at its end."""
        until = self._next_stop()
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
        if evaluated or self.step % every == 0:
            self._save()
        if self.run.signals.received is not None:
            self._save()
            raise Stopped(
                self.run.signals.received,
                f"stopped after step {self.step} of {self.total_steps}; the same command continues from there",
            )

    def _next_stop(self) -> int:
        """The step of the next thing to do, at most an interval away."""
        every = self.config.run.checkpoint_every_steps
        due = min(
            self.target,
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
        state = {"stage": self.stage, **answers[0][1], "best": self.best, "last": self.last}
        folder = self.checkpoints.complete(writing, self.checkpoints.name(self.stage, self.step), entries, state)
        if self.best and self.best["step"] == self.step:
            self.checkpoints.copy_weights(folder, self.best["checkpoint"])
        self.checkpoints.tidy(self.config.run.keep_checkpoints)


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
