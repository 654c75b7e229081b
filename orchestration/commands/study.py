"""`expertail study`: train the runs of a study side by side, or what is left of them.

study
    `read_study`, `lay_out`      what runs there are; every refusal before anything starts
    `StudyFolder.take`           names of known runs stay; study.json
    `SideBySide.carry_out`       lanes on one Ray
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experts.data.download import missing_root
from orchestration.cluster.connection import cluster, node_resources, own_address
from orchestration.config.compose import compose
from orchestration.config.messages import in_one_line, say, show
from orchestration.config.paths import import_roots
from orchestration.config.run_config import RunConfig
from orchestration.results.text import plural
from orchestration.runs.stopping import Stopped, signals_stop
from orchestration.storage.location import STUDY_LANE
from orchestration.studies.adoption import carry_out, find, held_against
from orchestration.studies.estimate import plan_lines
from orchestration.studies.grid import Grid, lay_out
from orchestration.studies.lanes import LOG_FILE, Lanes
from orchestration.studies.points import Point
from orchestration.studies.progress import Progress
from orchestration.studies.run_queue import FAILED, FINISHED, WAITING
from orchestration.studies.side_by_side import SideBySide
from orchestration.studies.status import status_text
from orchestration.studies.study_config import read_study
from orchestration.studies.study_folder import StudyFolder, held, refuse, with_a_folder
from orchestration.tracking.series import StudyUpload

_STOPPED_WAIT_S = 10.0  # for the last upload of a study that was stopped: batch systems kill soon after their signal
_LIVE_S = 600.0  # between two reports while runs train
_FIRST_LANES = 2  # that are started before anybody knows how many places there are
_LANE = (sys.executable, "-P", "-m", "orchestration.commands.lane")


def plan_study(words: Sequence[str]) -> str:
    """Return what a study would train, where and for how long. Nothing is started or written.

    Raises:
        ValueError: everything that is wrong with it.
    """
    grid = with_a_folder(lay_out(read_study(words), files=False))
    folder = StudyFolder(grid.folder)
    refuse(grid.name, list(folder.problems_with(grid)))
    nodes = None
    if grid.address is not None:
        with cluster(grid.address):
            nodes = node_resources()
    adoption = held_against(find(grid.study.adopt, folder), folder, grid.points) if grid.study.adopt else None
    return "\n".join(plan_lines(grid, folder, nodes, adoption))


def study(words: Sequence[str]) -> int:
    """Train the runs of a study, or what is left of them.

    Returns:
        The exit code: 1 when a run failed.

    Raises:
        ValueError: the study is malformed, or its folder holds something else. Raised before anything is started.
        Stopped: on a signal, after checkpoints; the same command goes on.
    """
    # The first also covers the moments between the others, which have their own ways to stop.
    with signals_stop("the study was prepared"), contextlib.ExitStack() as stack:
        grid = with_a_folder(lay_out(read_study(words)))  # before a cluster is asked: refusals come at once
        refuse(grid.name, list(StudyFolder(grid.folder).problems_with(grid)))
        refuse(grid.name, _missing_data(grid))
        elsewhere = find(grid.study.adopt, StudyFolder(grid.folder))
        lock = stack.enter_context(held(grid.folder))
        lanes = stack.enter_context(_lanes(grid, lock))
        stack.enter_context(cluster(grid.address))
        grid, folder, points = _take(grid)
        lent = carry_out(elsewhere, folder, points, grid.defaults, say) if grid.study.adopt else {}
        upload = _upload(grid, folder)  # before its runs, which find their parents in MLflow by the study's key
        try:
            number = _train(grid, folder, points, lanes, lent)
        except Exception:  # a full disk, say: how the runs stand is shown and sent all the same
            _conclude(folder, lanes, upload, whole=False)
            raise
        _conclude(folder, lanes, upload, whole=number is None)
    if number is not None:
        report = f"; a report of what has finished: expertail report {folder.path}" if folder.finished() else ""
        raise Stopped(number, f"study {grid.name}: stopped; the same command goes on{report}")
    failed = [point.run for point in points if folder.record(point.run)["status"] == FAILED]
    if failed:
        say(f"failed: {', '.join(failed)}; study.retry=failed trains them again")
    return 1 if failed else 0


def _missing_data(grid: Grid) -> list[str]:
    """Return why runs that are left could not open their data, each cause once.

    Finished runs need no data, and runs that may be taken over from elsewhere need none either.
    """
    if grid.study.adopt:
        return []
    done = {record["identity"] for record in StudyFolder(grid.folder).finished()}
    left: dict[tuple[str, ...], Point] = {}  # a run of each data set: words name it, or a saved run brings it
    for point in grid.points:
        if point.identity not in done:
            left.setdefault(tuple(w for w in point.words if w.startswith(("dataset", "method.like"))), point)
    found = (missing_root(compose(list(point.words)).config.dataset) for point in left.values())
    return list(dict.fromkeys(problem for problem in found if problem is not None))


def _take(grid: Grid) -> tuple[Grid, StudyFolder, list[Point]]:
    """Lay a study out for its cluster and make it that of its folder. Return both, and its runs."""
    if share := gpu_share(node_resources()):
        grid = lay_out(grid.study, share).named(grid.name)
    folder = StudyFolder(grid.folder)
    refuse(grid.name, list(folder.problems_with(grid)))
    points = folder.take(grid)
    refuse(grid.name, folder.settle(points, retry=grid.study.retry == "failed"))
    return grid, folder, points


def _conclude(folder: StudyFolder, lanes: Lanes, upload: StudyUpload | None, *, whole: bool) -> None:
    """Say how the runs stand, write the report and upload it.

    Args:
        folder: of the study.
        lanes: that end.
        upload: of the study.
        whole: whether every run has ended. Otherwise there is no report, and the upload is soon over.
    """
    wait_s: float | None = _STOPPED_WAIT_S
    with signals_stop("the study's report was written"):
        try:
            if whole:
                _evaluate(folder)
            show(status_text(folder.path, who=False))
            if whole and any(record["status"] == FINISHED for record in folder.records):
                _report(folder)
            lanes.finish(say)  # their uploads come before the study's own
            wait_s = None if whole else _STOPPED_WAIT_S
        finally:
            if upload is not None:
                upload.finish(wait_s)


def gpu_share(nodes: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the CPUs that each GPU's worker can have on every node with GPUs, at most 8; None without GPUs."""
    shares = [node.get("CPU", 0.0) / node["GPU"] for node in nodes.values() if node.get("GPU", 0) >= 1]
    if not shares:
        return None
    least = min(shares)
    return float(min(8, int(least))) if least >= 1 else max(0.01, int(least * 100) / 100)


@contextlib.contextmanager
def _lanes(grid: Grid, lock: int) -> Iterator[Lanes]:
    """Start the first lanes: they load their libraries while a local Ray starts. All are ended at the end."""
    lanes = Lanes(_LANE, grid.folder, {STUDY_LANE: "1"}, [lock])
    known = {record["run"] for record in StudyFolder(grid.folder).finished()}
    left = sum(point.run not in known for point in grid.points)
    try:
        for _ in range(min(_FIRST_LANES, left, _most(grid) or left)):
            lanes.start()
        yield lanes
    finally:
        lanes.close()


def _most(grid: Grid) -> int | None:
    """Return study.parallel; None where the places of the cluster decide."""
    return None if grid.study.parallel == "auto" else grid.study.parallel


def _train(
    grid: Grid, folder: StudyFolder, points: Sequence[Point], lanes: Lanes, lent: Mapping[str, Path]
) -> int | None:
    """Train what is left. Return the signal that stopped it, if one did."""
    left = [point for point in points if folder.record(point.run)["status"] == WAITING]
    done = sum(folder.record(point.run)["status"] == FINISHED for point in points)
    others = len(folder.records) - len(points)
    more = f"; {plural(others, 'run')} of the folder not asked for now, in its report all the same" if others else ""
    say(
        f"study {grid.name}: {plural(len(points), 'run')}, {done} finished, {len(left)} to train; folder {folder.path}"
        f"{more}"
    )
    if not left:
        return None
    lanes.connect(own_address())
    live, progress = _LiveReport(folder), Progress()

    def look(line: str) -> None:
        progress.draw(line)
        live.write()

    try:
        runs = SideBySide(
            folder, points, lanes, node_resources, _most(grid), grid.defaults,
            progress.say, live.note, lent, look,
        )  # fmt: skip
        return runs.carry_out()
    finally:
        progress.close()
        live.end()


class _LiveReport:
    """Writes the report while runs train, in a process of its own, every ten minutes if runs have ended since."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._next = time.monotonic() + _LIVE_S
        self._changed = False

    def note(self) -> None:
        """Note that a run has ended."""
        self._changed = True

    def write(self) -> None:
        """Write it again if a run has ended, unless that was done a short while ago or is going on."""
        going_on = self._process is not None and self._process.poll() is None
        if not self._changed or going_on or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LIVE_S
        with contextlib.suppress(OSError):  # no memory for a process, a full disk: runs go on, and the next may be made
            self._start()
            self._changed = False

    def _start(self) -> None:
        command = [sys.executable, "-P", "-m", "orchestration", "report", str(self._folder.path)]
        path = os.pathsep.join(import_roots() + list(filter(None, [os.environ.get("PYTHONPATH")])))
        with open(self._folder.path / LOG_FILE, "ab") as log:
            environment = {**os.environ, "PYTHONPATH": path}
            self._process = subprocess.Popen(
                ["nice", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def end(self) -> None:
        """End a report that is being written: the last one follows."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


def _evaluate(folder: StudyFolder) -> None:
    """Measure finished runs as the study asks."""
    from orchestration.commands.study_evaluations import evaluate_asked  # loads PyTorch

    evaluate_asked(folder, say)


def _report(folder: StudyFolder) -> None:
    """Write the report and print its answers. A failure costs a line: the runs are trained."""
    from orchestration.commands.report import report  # loads Matplotlib

    try:
        show(f"\n{report([str(folder.path)], None, None, None)}")
    except Exception as problem:
        say(f"the report was not written ({in_one_line(problem)}); again: expertail report {folder.path}")


def _tracked(grid: Grid) -> RunConfig | None:
    """Return the config of the study's first run if it is tracked."""
    config = compose([*grid.points[0].words, *grid.defaults]).config
    return config if config.tracking.enabled else None


def _upload(grid: Grid, folder: StudyFolder) -> StudyUpload | None:
    """Start the upload of the study itself, which follows it while it trains; None where it is not tracked."""
    config = _tracked(grid)
    if config is None or config.tracking.uri is None:
        return None
    if any("adopted" in record for record in folder.records):
        say(f"runs that were taken over are sent to MLflow by: expertail sync {folder.path}")
    tracking = config.tracking
    return StudyUpload(folder.path, config.tracking.uri, tracking.experiment, tracking.final_wait_s)
