"""Take a few real steps of a run, and extrapolate how long the whole run will take and what it will cost.

Workers are placed as the config says, open the data, train some steps of every stage, evaluate once and write one
checkpoint, in a folder beside the runs that is removed afterwards. Nothing is tracked. The times of a whole run follow
from these measured durations and from the known numbers of steps, evaluations and checkpoints.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.cluster.connection import cluster, node_resources
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.placement import bundle_of, places
from orchestration.cluster.transfer import receive_saved, send
from orchestration.config.recipe import stage_classes
from orchestration.config.run_config import RunConfig, RunSettings
from orchestration.preflight.plan import epoch_of
from orchestration.results.text import duration, plural, text_table
from orchestration.runs.admission import admit
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.exports import model_folder, weights_of
from orchestration.storage.location import run_path
from orchestration.storage.remote_run_folder import UnsharedRunFolder
from orchestration.storage.run_folder import RunFolder
from orchestration.storage.url_store import is_url

STEPS = 30
_WARM_UP = 3  # steps that still allocate memory and open files
_LEAST = 5  # steps to time, however long they take
_LIMIT_S = 60.0  # for the steps of a stage, once _LEAST are timed
_INTERVAL_S = 1.0  # between two calls of a run's driver to its workers


@dataclass(frozen=True)
class StageProbe:
    """Measured durations of a stage, and how often each will occur.

    Attributes:
        name: of the stage.
        batch_size: images of a full batch.
        step_s: seconds of each full batch that was timed.
        call_s: seconds that one call of the driver adds to an interval of steps.
        begin_s: seconds from loaded libraries to the first step, plus the extra time of the first steps.
        evaluation_s, save_s: seconds that training stops for one evaluation of all splits, and for one checkpoint.
        steps: steps of the whole stage.
        images: images of the whole stage. A partial batch counts as its share of a full one.
        evaluations, saves: evaluations and checkpoints of the whole stage.
        peak_gib: most memory of a worker so far.
        gpu_peak_gib: most memory of a worker's GPU so far; None on CPUs.
    """

    name: str
    batch_size: int
    step_s: tuple[float, ...]
    call_s: float
    begin_s: float
    evaluation_s: float
    save_s: float
    steps: int
    images: int
    evaluations: int
    saves: int
    peak_gib: float
    gpu_peak_gib: float | None = None

    def spread(self) -> tuple[float, float, float]:
        """Return the mean step time, and bounds that enclose the middle 80 % of the step times, and the mean."""
        mean = statistics.fmean(self.step_s)
        low, high = np.quantile(self.step_s, [0.1, 0.9])
        return mean, min(mean, float(low)), max(mean, float(high))

    def seconds(self, step_s: float) -> float:
        """Return the seconds of the whole stage, given the time of a full batch."""
        # The driver calls for about a second of steps at once, at least one, so the cost of a call is shared by those.
        intervals = self.steps / max(1.0, _INTERVAL_S / step_s)
        training = self.images / self.batch_size * step_s + intervals * self.call_s
        return self.begin_s + training + self.evaluations * self.evaluation_s + self.saves * self.save_s


@dataclass(frozen=True)
class Probe:
    """Measurements of a run.

    Attributes:
        config: with CPUs and threads resolved.
        startup_s: seconds until workers have loaded their libraries, by phase.
        stages: in the order of the recipe.
        at_once: number of stages that the cluster has room for at the same time.
    """

    config: RunConfig
    startup_s: Mapping[str, float]
    stages: tuple[StageProbe, ...]
    at_once: int

    def wall_s(self, which: int) -> float:
        """Return seconds from command to end of the last stage, at the mean (0), low (1) or high (2) step time."""
        seconds = {stage.name: stage.seconds(stage.spread()[which]) for stage in self.stages}
        total = sum(self.startup_s.values())
        # In a wave, each stage goes to the set of workers that is free first.
        for wave in self.config.method.waves():
            busy_s = [0.0] * min(self.at_once, len(wave))  # of each set of workers
            for name in wave:
                busy_s[busy_s.index(min(busy_s))] += seconds.get(name, 0.0)
            total += max(busy_s)
        return total

    def worker_s(self) -> float:
        """Return the worker-seconds of the run: the time that each worker is held, summed over workers."""
        training = sum(stage.seconds(stage.spread()[0]) for stage in self.stages)
        return self.config.cluster.workers * (self.startup_s["libraries"] * self.at_once + training)


def probe(config: RunConfig, begun: float, wanted: int = STEPS) -> Probe:
    """Take some steps of every stage of a run and measure them.

    Args:
        config: validated.
        begun: unix seconds at which the command began.
        wanted: steps to time in each stage; fewer if they take longer than a minute, or the stage has fewer.

    Raises:
        ValueError, FloatingPointError, WorkerLost: as for training.
    """
    admitted = admit(config)
    with cluster(config.cluster.address):
        marks = [begun, time.time()]
        nodes = node_resources()
        config = admitted.on(nodes).config
        # A spare process would take CPUs while steps are timed, and nothing is meant to fail here.
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"standby": 0})})
        shape = admitted.shape
        assert config.cluster.cpus_per_worker is not None
        bundle = bundle_of(config.cluster, config.cluster.cpus_per_worker)
        room = sum(places(node, bundle) for node in nodes.values()) // shape.workers
        fleet = Fleet(config, shape)
        try:
            fleet.start()
            marks.append(time.time())
            with _scratch(config) as folder:
                stages = tuple(_ShortRun(config, fleet, folder, wanted).stages())
        finally:
            fleet.close()
    spans = [after - before for before, after in itertools.pairwise(marks)]
    startup = dict(zip(("Ray", "libraries"), spans, strict=True))
    return Probe(config, startup, stages, max(1, min(room, config.side_by_side)))


@contextlib.contextmanager
def _scratch(config: RunConfig) -> Iterator[RunFolder]:
    """Make a run folder beside the runs, and remove it afterwards; run.dir as well, if it did not exist."""
    parent = run_path(config).parent
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=parent) as place:
            kind = UnsharedRunFolder if is_url(config.run.dir) else RunFolder
            folder = kind(Path(place))
            try:
                yield folder
            finally:
                folder.close()
    finally:
        with contextlib.suppress(OSError):  # another process has started a run there
            for path in missing:
                path.rmdir()


class _ShortRun:
    """Trains a few steps of every stage of a run, one stage after the other on one fleet."""

    def __init__(self, config: RunConfig, fleet: Fleet, folder: RunFolder, wanted: int) -> None:
        self._config, self._fleet, self._folder, self._wanted = config, fleet, folder, wanted
        self._checkpoints = Checkpoints(folder.path, list(config.method.stages))

    def stages(self) -> Iterator[StageProbe]:
        """Measure the stages that a run reaches within run.max_steps."""
        before, limit = 0, self._config.run.max_steps
        for wave in self._config.method.waves():
            if limit is not None and before >= limit:
                return
            stages = self._config.method.stages
            measured = [self._stage(name, before) for name in wave if stages[name].epochs]
            before += sum(total for _, total in measured)
            yield from (stage for stage, _ in measured)

    def _stage(self, name: str, before: int) -> tuple[StageProbe, int]:
        """Measure a stage. Returns it, and the number of its steps if run.max_steps does not end it."""
        settings, run = self._config.method.stages[name], self._config.run
        begun = time.monotonic()
        data = self._begin(name)
        begin_s = time.monotonic() - begun
        counts = np.array(data["counts"])[stage_classes(self._config.method, name, data["counts"])]

        assert settings.batch_size is not None
        images, per_epoch, _ = epoch_of(name, settings, counts)
        total = settings.epochs * per_epoch
        target = total if run.max_steps is None else min(run.max_steps - before, total)

        step_s, call_s, first_s, done = self._steps(total, settings.batch_size)
        evaluation_s = sum(
            self._timed("evaluate", split)[0] for split in (["val", "test"] if data["has_val"] else ["test"])
        )
        save_s = self._save(name, done, total)

        epochs, rest = divmod(target, per_epoch)
        evaluations, saves = count_due(target, total, per_epoch, run)
        stage = StageProbe(
            name=name,
            batch_size=settings.batch_size,
            step_s=tuple(step_s),
            call_s=call_s,
            begin_s=begin_s + first_s,
            evaluation_s=evaluation_s,
            save_s=save_s,
            steps=target,
            images=epochs * images + min(rest * settings.batch_size, images),
            evaluations=evaluations,
            saves=saves,
            peak_gib=max(self._fleet.call("peak_memory_gib")),
            gpu_peak_gib=max((gib for gib in self._fleet.call("gpu_peak_memory_gib") if gib is not None), default=None),
        )
        return stage, total

    def _begin(self, name: str) -> dict[str, Any]:
        """Build a stage's workers with their initial weights. Returns one worker's description of the data."""
        method = self._config.method
        teachers = {
            teacher: send(
                model_folder(self._config, self._folder, self._checkpoints, source), shared=self._folder.shared
            )
            for teacher, source in method.stages[name].teachers.items()
        }
        data = self._fleet.build(name, teachers)[0]
        self._folder.write_data({key: data[key] for key in ("class_names", "counts", "digest", "image_shape")})
        source = method.starts_from(name)
        if source is not None and source.stage is not None:
            self._fleet.call("start_from", send(weights_of(self._checkpoints, source), shared=self._folder.shared))
        elif source is not None:
            model = model_folder(self._config, self._folder, self._checkpoints, source)
            self._fleet.call("start_from_model", send(model, shared=self._folder.shared))

        if data["prepares"]:
            self._fleet.call("prepare")
        return data

    def _steps(self, total: int, batch_size: int) -> tuple[list[float], float, float, int]:
        """Take steps one by one and time them.

        Returns:
            Seconds of each step, of full batches only if there are any; mean seconds of a call; seconds by which the
            first steps were slower; and the number of steps taken.
        """
        full, partial, calls, done = list[float](), list[float](), list[float](), 0
        first_s = 0.0
        begun = time.monotonic()
        while done < min(total, _WARM_UP + self._wanted):
            took_s, answers = self._timed("train", done + 1)
            done += 1
            if done <= _WARM_UP and total > _WARM_UP:
                first_s += took_s
                continue

            interval = answers[0]
            share = interval.images / batch_size
            (full if share == 1 else partial).append(interval.seconds / share)
            calls.append(took_s - interval.seconds)
            if len(calls) >= _LEAST and time.monotonic() - begun > _LIMIT_S:
                break

        # First steps are slow; the part above the usual time counts once, as part of the beginning.
        step_s, call_s = full or partial, statistics.fmean(calls)
        expected_s = min(done, _WARM_UP) * (statistics.fmean(step_s) + call_s)
        return step_s, call_s, max(first_s - expected_s, 0.0), done

    def _timed(self, method: str, *args: Any) -> tuple[float, list[Any]]:
        begun = time.monotonic()
        answers = self._fleet.call(method, *args)
        return time.monotonic() - begun, answers

    def _save(self, name: str, done: int, total: int) -> float:
        """Write a checkpoint, which later stages may start from or learn from. Returns the seconds that training stops.

        That is the copy in the workers' memory: files are written while training goes on.
        """
        stopped_s, counters = self._timed("snapshot")
        writing = self._checkpoints.begin()
        answers = self._fleet.call("write", str(writing) if self._folder.shared else None)
        entries = receive_saved(answers, writing)
        state = {"stage": name, "total_steps": total, **counters[0], "best": None, "last": None}
        self._checkpoints.complete(writing, self._checkpoints.name(name, done), entries, state)
        return stopped_s


def count_due(steps: int, total: int, per_epoch: int, run: RunSettings) -> tuple[int, int]:
    """Count the evaluations and checkpoints that `StageRun` makes in the first steps of a stage.

    A step at which both are due has one checkpoint. A stage that ends where no evaluation is due makes one
    nevertheless, and a checkpoint with it.

    Args:
        steps: steps that the stage takes.
        total: steps that it would take if run.max_steps did not end it.
        per_epoch: steps per epoch.
        run: says how often to evaluate and save.
    """
    every = run.evaluate_every_epochs * per_epoch
    evaluated = set(range(every, steps + 1, every))
    if steps == total:
        evaluated.add(steps)
    saved = evaluated.union(range(run.checkpoint_every_steps, steps + 1, run.checkpoint_every_steps))
    extra = steps not in evaluated
    return len(evaluated) + extra, len(saved) + extra


def time_lines(found: Probe) -> Iterator[str]:
    """Describe how long a run will take, in words and a table."""
    parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in found.startup_s.items())
    yield f"start-up: {sum(found.startup_s.values()):.1f} s ({parts}), then data, model and engine of the first stage"
    rows = [[
        "stage", "all steps", "s per step", "middle 80 %", "timed", "images/s",
        "begin", "evaluations", "checkpoints", "",
    ]]  # fmt: skip
    for stage in found.stages:
        mean, low, high = stage.spread()
        rows.append([
            stage.name, f"{stage.steps:,}", f"{mean:.3g}", f"{low:.3g} to {high:.3g}", str(len(stage.step_s)),
            f"{stage.batch_size / mean:,.0f}", f"{stage.begin_s:.1f} s",
            f"{stage.evaluations} x {stage.evaluation_s:.2f} s", f"{stage.saves} x {stage.save_s:.2f} s",
            duration(stage.seconds(mean)),
        ])  # fmt: skip
    yield from text_table(rows, left=(0,))
    mean, low, high = (found.wall_s(which) for which in range(3))
    yield f"whole run: {duration(mean)} ({duration(low)} to {duration(high)}, by the spread of the step times)"
    cluster_config = found.config.cluster
    worker_hours = found.worker_s() / 3600
    gpus = worker_hours * cluster_config.gpus_per_worker
    cpus = worker_hours * (cluster_config.cpus_per_worker or 0)
    beside = f"; {found.at_once} stages at a time" if found.at_once > 1 else ""
    yield f"{gpus:.3g} GPU-hours, {cpus:.3g} CPU-hours of {plural(cluster_config.workers, 'worker')}{beside}"
    on_gpu = [stage.gpu_peak_gib for stage in found.stages if stage.gpu_peak_gib is not None]
    of_gpu = f", of its GPU {max(on_gpu):.2f} GiB" if on_gpu else ""
    yield f"peak memory of a worker: {max(stage.peak_gib for stage in found.stages):.2f} GiB{of_gpu} (measured)"
    yield "not included: export, pictures and upload at the end of the run; failures; other load on the machines"
