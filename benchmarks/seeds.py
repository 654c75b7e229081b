"""Runs over several seeds: train them two side by side with one thread each, and read what they found.

The tables of docs/results.md are made of such runs (systems.py, classifiers.py, losses.py). A run that is finished is
not repeated, and one that was stopped goes on. Processes started by several commands, even from several checkouts, may
share a folder of runs: each run is claimed by one, and the places where they train are shared. While the folder has a
file `PAUSE`, no further run starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from orchestration.storage.run_folder import origin

Words = tuple[str, ...]
GROUPS: Words = ("all", "many", "medium", "few", "many_by_index", "medium_by_index", "few_by_index")
ONE_THREAD: Words = (
    "engine.threads=1", "cluster.cpus_per_worker=1", "tracking.enabled=false", "run.log_interval_s=30",
)  # fmt: skip
FASHION: Words = ("dataset=fashion_mnist_lt", "dataset.max_per_class=1000", "dataset.imbalance_ratio=100")
CIFAR: Words = (
    "dataset=image_folder_lt", "dataset.imbalance_ratio=100", "dataset.max_per_class=1000",
    "dataset.index_groups=[3,7]", "dataset.mean=[0.4914,0.4822,0.4465]", "dataset.std=[0.2023,0.1994,0.2010]",
    "dataset.augment.crop_padding=4", "dataset.augment.horizontal_flip=0.5",
)  # fmt: skip
"""CIFAR-10 as a tree of JPEG files: train/<class>/*, test/<class>/*."""

_LOOK_S = 1.0
_REST_S = 3.0  # longer than _LOOK_S, so that a process of another command can take the place

mp = multiprocessing.get_context("spawn")  # each process starts its own Ray


class Job(NamedTuple):
    """A run to train: the name of its folder, and its words without those that say where."""

    name: str
    words: Words


def train_all(runs: Path, jobs: Sequence[Job], side_by_side: int = 2) -> None:
    """Train the jobs that are not finished, in their order, so many at a time in this folder.

    Returns when none is being trained by anybody: what follows may need all of them.

    Raises:
        SystemExit: some did not finish; names them.
    """
    runs.mkdir(parents=True, exist_ok=True)
    processes = [mp.Process(target=_work_through, args=(runs, jobs, side_by_side)) for _ in range(side_by_side)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    wait_for_others(runs, jobs)
    if missing := [job.name for job in jobs if not is_finished(runs / job.name)]:
        sys.exit(f"not finished: {', '.join(missing)}; see their .log in {runs}, and start the same command again")


def wait_for_others(runs: Path, jobs: Sequence[Job]) -> None:
    """Wait until no other command trains one of the jobs."""
    for job in jobs:
        while True:
            with _claim(runs / f"{job.name}.lock") as free:
                if free:
                    break
            time.sleep(_LOOK_S)


def _work_through(
    runs: Path, jobs: Sequence[Job], side_by_side: int, train: Callable[[Path, Job], None] | None = None
) -> None:
    """Train the jobs that no other process trains, one after another."""
    for job in jobs:
        with _claim(runs / f"{job.name}.lock") as mine:
            if not mine or is_finished(runs / job.name):
                continue
            with _place(runs, side_by_side):
                (train or _train)(runs, job)
        time.sleep(_REST_S)


def _train(runs: Path, job: Job) -> None:
    """Train a job in the one Ray of this process, and print how it went."""
    import ray

    from orchestration.cli import main as expertail
    from orchestration.cluster.local_ray import start_local_ray

    if not ray.is_initialized():
        start_local_ray()
    start = time.monotonic()
    where = [f"run.dir={runs}", f"run.name={job.name}"]
    with open(runs / f"{job.name}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        code = expertail(["train", *job.words, *ONE_THREAD, *where])
    found = "done" if code == 0 else f"exit code {code}, see {runs}/{job.name}.log"
    print(f"{time.strftime('%H:%M:%S')} {job.name}: {found}, {time.monotonic() - start:.0f} s", flush=True)


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Hold a file if no other process does; yields whether this one holds it."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _place(runs: Path, places: int) -> Iterator[None]:
    """Wait for one of so many places in a folder, and until nobody wants a pause; hold the place."""
    while True:
        for i in range(places):
            with _claim(runs / f"place-{i}.lock") as mine:
                if mine and not (runs / "PAUSE").exists():
                    yield
                    return
        time.sleep(_LOOK_S)


def is_finished(folder: Path) -> bool:
    """Say whether a run ended as it should."""
    path = folder / "run.json"
    return path.exists() and json.loads(path.read_text()).get("status") == "finished"


def evaluation(folder: Path, final: str | None = None) -> dict[str, Any]:
    """Return the last evaluation of a run, or of one of its final stages."""
    where = folder / "evaluation" / final if final else folder / "evaluation"
    return json.loads((where / "last.json").read_text())  # type: ignore[no-any-return]


def accuracies(evaluations: Iterable[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Return the top-1 of every evaluation by group, as shares; None where a group has no class."""
    found = [entry["members"]["ensemble"]["top1"] for entry in evaluations]
    return {group: [top1[group] for top1 in found] for group in GROUPS}


def mean_and_spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation; None where too few values are known."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None


def percent(mean: float | None, spread: float | None = None) -> str:
    """Return a share in percent, with its standard deviation if that is given."""
    if mean is None:
        return "n/a"
    return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def made_by(folder: Path) -> dict[str, Any]:
    """Return commit, versions and hardware of a run."""
    return origin(json.loads((folder / "run.json").read_text()))


def training_work(stages: Iterable[Any]) -> float | None:
    """Return the multiply-adds of training some stages of a plan; None if unknown.

    Teachers count where they are stages of the plan, and not where they are other runs.
    """
    parts = [(stage.work, stage.images_per_epoch, stage.epochs) for stage in stages if stage.epochs]
    return None if any(None in part for part in parts) else sum(math.prod(part) for part in parts)
