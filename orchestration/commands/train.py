"""`expertail train`: hold the run folder, train with an uploader beside it, write the report.

train_and_report
    `admit`               refuse a config that cannot work
    `open_run_folder`     hold the folder; print the table of a finished run and stop
    `_placed`             decide cluster.experts_per_worker=auto
    `train`               all stages, resumed where they stopped
    `_conclude`           models, table, status
    `_report`             pictures and page; they change nothing about how the run ended
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from experts.data.names import visible
from orchestration.cluster.connection import cluster, node_resources
from orchestration.cluster.placement import shape_of, shapes_of, with_shape
from orchestration.cluster.preemption import Preempted
from orchestration.config.folders import digests
from orchestration.config.messages import in_one_line, say, show
from orchestration.config.run_config import RunConfig
from orchestration.preflight.plan import size_of
from orchestration.results.measures_table import measures_lines
from orchestration.results.page import PAGE, write_page
from orchestration.results.run_table import run_table
from orchestration.runs.admission import Admission, admit
from orchestration.runs.console import Console
from orchestration.runs.driver import train
from orchestration.runs.finished import is_complete
from orchestration.runs.stopping import Outcome, Stopped, signals_stop
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.exports import export_finals
from orchestration.storage.files import CONFIG, evaluations, final_evaluations, write_atomic
from orchestration.storage.location import open_run_folder
from orchestration.storage.run_folder import RunFolder
from orchestration.tracking.ownership import settle_ownership
from orchestration.tracking.target import tracking_uri
from orchestration.tracking.uploader import Uploader, start_uploader

TABLE = Path("report", "table.txt")
_SHORT_WAIT_S = 10.0  # for the upload after a failure: its message should not wait long
_STOPPED_WAIT_S = 60.0  # for run.dir after a failure: the newest checkpoint is worth more


def train_and_report(config: RunConfig, marks: dict[str, float], files: Sequence[str] = ()) -> int:
    """Train a run or the rest of it, and write its report, models and table. Returns the exit code.

    Args:
        config: of the run.
        marks: times of what has happened so far.
        files: names of the files that made the config, for the run's record.
    """
    admitted = admit(config)
    folder = open_run_folder(config)
    folder.recipe = digests(files)
    try:
        if folder.started and is_complete(folder, config):
            say(f"{folder.path} is finished; set another run.name to train again")
            drawn = (folder.path / "report" / PAGE).exists()  # else it was stopped while it drew
            if not drawn and _report(config, folder):
                say(f"its report is drawn now; to upload it: expertail sync {folder.path}")
            show(_stored_table(config, folder))
            folder.wait_until_stored()
            return 0
        return _train(_placed(admitted, folder), folder, marks)
    finally:
        folder.close()  # releases the lock of the folder


def _placed(admitted: Admission, folder: RunFolder) -> Admission:
    """Decide cluster.experts_per_worker=auto: as the run began, or else by what is fastest on this cluster."""
    config = admitted.config
    if config.cluster.experts_per_worker != "auto":
        return admitted
    num_experts = config.method.num_experts
    fitting = {shape.experts_per_worker: shape for shape in shapes_of(num_experts, config.cluster.workers)}
    if folder.started:
        # A measurement may come out otherwise this time, and the last bits of a result would change within the run.
        begun = shape_of(num_experts, folder.stored_config().cluster).experts_per_worker
        if begun in fitting:
            return admit(with_shape(config, fitting[begun]))
    if len(fitting) == 1:
        return admit(with_shape(config, admitted.shape))

    from orchestration.preflight.placements import compare, measure_for
    from orchestration.preflight.placements_text import choice_line, record

    say("measuring which placement is fastest, before the first start")
    with cluster(config.cluster.address):
        nodes = node_resources()
        found = compare(config, nodes, measure_for(config, nodes))
    for line in [choice_line(found), *(found.measured.problems if found.measured else ())]:
        say(line)
    return replace(admit(with_shape(config, found.choice.shape)), placement=record(found))


def _train(admitted: Admission, folder: RunFolder, marks: dict[str, float]) -> int:
    config = admitted.config
    uploader = _Tracking(config, folder)
    try:
        with Console(interval_s=config.run.log_interval_s, stream=sys.stderr) as console:
            uploader.report = console.message
            console.message(f"run folder {folder.path}")
            outcome = train(admitted, folder, console, marks, uploader.begin)
        with signals_stop("its results were written"):
            _conclude(config, folder, outcome)
    except BaseException as problem:
        # Record how the run ended, save what it has, and end the uploader, each even if the one before fails.
        stopped = isinstance(problem, Stopped | Preempted | KeyboardInterrupt | SystemExit)
        with contextlib.suppress(OSError):  # a full disk must not hide the first problem
            if (folder.path / CONFIG).exists():
                folder.update_run(status="stopped" if stopped else "failed", problem=str(problem))
        try:
            folder.wait_until_stored(_STOPPED_WAIT_S)
        except ValueError as left:
            say(str(left))
        uploader.end("KILLED" if stopped else "FAILED", wait_s=min(_SHORT_WAIT_S, config.tracking.final_wait_s))
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder, problem) from problem
        raise

    # Training is over and kept: from here on nothing may change how it ended.
    stop = _draw_until_stopped(config, folder, outcome)
    show(_stored_table(config, folder))
    if not outcome.finished:
        say(
            f"run.max_steps = {config.run.max_steps} ended this start before the end of training (still to "
            f"do: stage {', '.join(outcome.cut)}); the same command with a larger limit, or none, goes on"
        )
    wait_s = config.tracking.final_wait_s
    uploader.end("FINISHED", wait_s=min(_SHORT_WAIT_S, wait_s) if stop else wait_s)
    path = folder.path
    say(f"report: {path / 'report' / PAGE}; models: {path / 'export'}; to use one: expertail predict {path} FILE ...")
    folder.wait_until_stored()
    if stop:
        raise stop
    return 0


def _draw_until_stopped(config: RunConfig, folder: RunFolder, outcome: Outcome) -> Stopped | None:
    """Draw the report of a run that has one. Returns what stopped that; the exit code then says so."""
    if outcome.signal is not None:
        name = signal.Signals(outcome.signal).name
        return Stopped(outcome.signal, f"stopped by {name} after the last step; the same command draws the report")
    try:
        with signals_stop("its report was drawn"):
            if (folder.path / TABLE).exists():
                _report(config, folder, files_known=True)  # its workers compared them
    except Stopped as stop:
        return stop
    return None


def _full(folder: RunFolder, problem: OSError) -> ValueError:
    """Remove what was half written to a full disk. Returns the error that says so."""
    Checkpoints(folder.path, []).clean()  # before the message, which says how much is free then
    disk = shutil.disk_usage(folder.path)
    return ValueError(
        f"{problem.filename or folder.path}: {problem.strerror}; {disk.free / 2**20:.1f} of {disk.total / 2**20:.1f} "
        f"MiB are free where {folder.path} lies; the newest checkpoint is complete; make room there "
        f"(run.keep_checkpoints limits how many are kept), and the same command continues from it"
    )


class _Tracking:
    """The uploader of a run, if it is tracked; started when there is something to send."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config, self._folder = config, folder
        self._uploader: Uploader | None = None
        self.report: Callable[[str], None] = say

    def begin(self) -> None:
        """Start the uploader, once."""
        wanted = self._config.tracking
        if wanted.enabled and self._uploader is None:
            where = self._folder.path, tracking_uri(self._config), wanted.experiment, self._config.run_name
            try:
                if line := settle_ownership(self._folder.path, self._folder.url):
                    self.report(line)
                self._uploader = start_uploader(*where, self.report)
            except ValueError as problem:  # of the upload alone
                self.report(f"tracking: {problem}; training goes on; later: expertail sync {where[0]}")
            except OSError as problem:  # no memory, processes or disk for it: the run needs none of them
                self.report(f"tracking: {in_one_line(problem)}; training goes on; later: expertail sync {where[0]}")

    def end(self, status: str, wait_s: float) -> None:
        """Let the uploader send the rest, and print what it could not send."""
        if self._uploader is None:
            return
        try:
            incomplete = self._uploader.finish(wait_s, status)
        except Exception as problem:  # the run has ended, well or not, and this does not change it
            incomplete = f"tracking: {in_one_line(problem)}; later: expertail sync {self._folder.path}"
        if incomplete:
            show(incomplete, sys.stderr)
        elif status == "FINISHED":
            with contextlib.suppress(Exception):  # a courtesy
                say(self._uploader.place() or "")


def _conclude(config: RunConfig, folder: RunFolder, outcome: Outcome) -> None:
    """Write the models, the table and how the run ended."""
    # An earlier start, cut by run.max_steps, may have drawn one. While it is missing, the report is still to be drawn.
    (folder.path / "report" / PAGE).unlink(missing_ok=True)
    stored = folder.stored_config()
    # A run that stopped in a stage that knows only some classes has no model or table yet.
    if stored.method.stages[outcome.stage].classes is None:
        export_finals(stored, folder, outcome.stage, outcome.checkpoint)
        (folder.path / TABLE).parent.mkdir(exist_ok=True)
        write_atomic(folder.path / TABLE, visible(_stored_table(config, folder), keep="\n") + "\n")
    size = _size(stored, folder) if outcome.finished else {}
    folder.update_run(status="finished" if outcome.finished else "stopped", ended=time.time(), **size)


def _size(config: RunConfig, folder: RunFolder) -> dict[str, dict[str, int | None]]:
    """Return parameters and multiply-adds per image of the ensemble that answers, for run.json."""
    try:
        found = size_of(config, config.method.final, len(folder.read_data()["counts"]))
    except Exception as problem:  # a size that cannot be counted must not cost the run
        say(f"the size of the ensemble was not counted: {in_one_line(problem)}")
        return {}
    return {"size": {"parameters": found.parameters, "multiply_adds": found.work}}


def _report(config: RunConfig, folder: RunFolder, *, files_known: bool = False) -> bool:
    """Draw the pictures and write the page. Whatever fails costs itself and one line: the run is trained.

    Returns:
        Whether the page was written.
    """
    if config.run.pictures:
        try:
            from orchestration.results.pictures import draw_report  # loads Matplotlib

            draw_report(folder.path, say, files_known=files_known)
        except Exception as problem:
            say(f"the pictures of the report were not drawn: {in_one_line(problem)}")
    try:
        write_page(folder.path)
    except Exception as problem:  # as of any picture
        say(f"report/{PAGE} was not written: {in_one_line(problem)}")
        return False
    return True


def _stored_table(config: RunConfig, folder: RunFolder) -> str:
    data, finals = folder.read_data(), final_evaluations(folder.path)
    table = run_table(config, data, evaluations(folder.path), finals)
    try:
        more = measures_lines(folder.path, data, list(finals) or [""])
    except Exception as problem:  # a damaged file of theirs must not cost the table
        more = [f"more measures are not shown: {in_one_line(problem)}"]
    return "\n".join([table, *([""] if more else []), *more])
