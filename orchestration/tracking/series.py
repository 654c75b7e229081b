"""Uploads of a study: of its runs by one process for each lane, and of the study itself, beside them.

One process uploads many runs, one after another: MLflow is imported once, which costs seconds. A run does not wait for
its upload: that goes on beside the next run. What a series could not send is said when it is known, and once more at
its end; `expertail sync` sends it later.

The study's own process follows study.json and the report; means of rows are sent as runs end (study_sender.py).

    parent -> process    a line of JSON per run: run_dir and target; when the run has ended, a line with `finish`
    process -> parent    a line of JSON per problem and per end of an upload
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestration.config.messages import in_one_line, say
from orchestration.config.paths import import_roots
from orchestration.results.text import plural
from orchestration.tracking.ownership import settle_ownership
from orchestration.tracking.process import RedactedStream, Target, set_priority
from orchestration.tracking.uploader import LOG_FILE, Uploader, instead, start_uploader

_LAST_WAIT_S = 2.0  # beyond the longest wait of a run, for the last request


class _SeriesUploader(Uploader):
    """The driver's handle on the upload of one run."""

    def __init__(self, run_dir: Path, target: Target, process: subprocess.Popen[bytes], waits: list[float]) -> None:
        super().__init__(run_dir, target, process)
        self._waits = waits
        self.send_message({"run_dir": str(run_dir), "target": asdict(target)})

    def finish(self, wait_s: float = 60.0, status: str | None = None) -> str | None:
        """Let the process send the rest. Return at once: nothing is missing yet."""
        self._finishing = True
        self._waits.append(wait_s)
        self.send_message({"finish": wait_s, "status": status})
        return None


class StudyUpload:
    """The upload of a study's own files and rows, from its start to its end. No error of it reaches training.

    Args:
        folder: of the study, with its study.json.
        uri: of the tracking store.
        experiment: MLflow experiment.
        wait_s: the longest wait for it at the end.
    """

    def __init__(self, folder: Path, uri: str, experiment: str, wait_s: float) -> None:
        self._folder, self._wait_s = folder, wait_s
        self._uploader: Uploader | None = None
        try:
            # First of all: the runs find their parents by the study's key, and a copy needs one of its own.
            if line := settle_ownership(folder):
                say(line)
            self._uploader = start_uploader(folder, uri, experiment, report=say)
        except (OSError, ValueError) as problem:  # of the upload alone
            say(f"tracking: {in_one_line(problem)}; training goes on; later: expertail sync {folder}")

    def finish(self, wait_s: float | None = None) -> None:
        """Send the rest, and say where the study is in MLflow, or what is missing there.

        Args:
            wait_s: the longest wait; None for that of the study.
        """
        if self._uploader is None:
            return
        try:
            line = self._uploader.finish(self._wait_s if wait_s is None else wait_s) or self._uploader.pages()
        except Exception as problem:  # the runs are trained, and this does not change it
            line = f"tracking: {in_one_line(problem)}; later: expertail sync {self._folder}"
        if line:
            say(line)


@contextlib.contextmanager
def one_uploader(tell: Callable[[str], None], study: str) -> Iterator[None]:
    """Upload all runs of this process by one process more, until the context ends.

    Args:
        tell: takes a line at the end where something was not sent. The end waits for what is left as long as the most
            patient run would (tracking.final_wait_s).
        study: folder that the line says to send later.
    """
    reads, writes = os.pipe()
    path = os.pathsep.join(import_roots() + list(filter(None, [os.environ.get("PYTHONPATH")])))
    process: list[subprocess.Popen[bytes]] = []
    problems: list[str] = []
    waits = [0.0]

    def begin(run_dir: Path, target: Target, report: Callable[[str], None]) -> Uploader:
        if not process or process[0].poll() is not None:  # the first run, or the process has died
            process[:] = [_start(writes, path)]
        return _SeriesUploader(run_dir, target, process[0], waits)

    listener = threading.Thread(target=_listen, args=(reads, problems), name="uploads", daemon=True)
    listener.start()
    instead.append(begin)
    try:
        yield
    finally:
        instead.remove(begin)
        os.close(writes)
        for running in process:
            assert running.stdin is not None
            with contextlib.suppress(OSError):
                running.stdin.close()
            wait_s = max(waits)
            try:
                running.wait(wait_s + _LAST_WAIT_S)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
                tell(f"tracking: not all runs were uploaded after {wait_s:.0f} s; later: expertail sync {study}")
        listener.join(_LAST_WAIT_S)
        if problems:
            text = f"tracking: the upload of {plural(len(problems), 'run')} failed, first with {problems[0]}"
            tell(f"{text}; later: expertail sync {study}")


def _start(writes: int, path: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "orchestration.tracking.series", str(writes)],
        stdin=subprocess.PIPE, pass_fds=(writes,), start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def _listen(reads: int, problems: list[str]) -> None:
    with open(reads, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            said = json.loads(line)
            problems.append(said["problem"])
            say(f"tracking, {Path(said['run_dir']).name}: {said['problem']}; later: expertail sync {said['run_dir']}")


# The process


@dataclass
class _Job:
    """One run to upload."""

    run_dir: Path
    target: Target
    wake: threading.Event = field(default_factory=threading.Event)
    last: dict[str, Any] = field(default_factory=lambda: {"finish": 10.0, "status": "KILLED"})


def main(arguments: list[str]) -> int:
    """Upload runs until standard input ends. A run that it has not said the end of was killed with its driver."""
    from orchestration.tracking.sender import upload

    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    set_priority(10)  # before the workers, which Ray has at 15
    jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    while (job := jobs.get()) is not None:

        def report(problem: str, run_dir: Path = job.run_dir) -> None:
            with contextlib.suppress(OSError):  # the driver has gone
                line = json.dumps({"run_dir": str(run_dir), "problem": problem})
                os.write(int(arguments[0]), line.encode() + b"\n")

        set_priority(0 if job.wake.is_set() else 10)  # the one before may have left another
        try:
            with open(job.run_dir / LOG_FILE, "ab") as log:
                for number in (1, 2):
                    os.dup2(log.fileno(), number)
            problem = upload(job.run_dir, job.target, job.wake, job.last, report)
        except Exception as error:  # of this run; the next may go well
            logging.getLogger("expertail.tracking").exception("the upload ended")
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            report(problem)
    return 0


def _receive(jobs: queue.SimpleQueue[_Job | None]) -> None:
    current: _Job | None = None
    for line in sys.stdin:
        message = json.loads(line)
        if "run_dir" in message:
            current = _Job(Path(message["run_dir"]), Target(**message["target"]))
            jobs.put(current)
        elif current is not None:
            current.last.update(message)
            current.wake.set()
            set_priority(0)  # as the uploader of a single run: what is left of it should not wait for others
    if current is not None:
        current.wake.set()
    set_priority(0)
    jobs.put(None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
