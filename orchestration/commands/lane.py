"""The process that trains one run of a study after another; see orchestration/studies/lanes.py for its other side.

    python -m orchestration.commands.lane EVENTS        EVENTS: number of an open file for lines of JSON

Each run is what `expertail train` makes of its words, bit for bit. Its text goes to console.log in its folder.
Libraries, the connection to Ray, the uploading process and, where they fit, the workers stay from run to run.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestration.studies.lanes import PARENT_GONE_S

LOG_FILE = "console.log"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a full quota
_RAY_GONE = 5  # seconds in a row without an answer: a Ray that ended with the parent; its own clients wait for a minute


class _Parent:
    """The study's process: runs come from it, and it is told what becomes of them."""

    def __init__(self, events: int) -> None:
        self._events = events
        os.set_inheritable(events, False)
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.training = False
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def say(self, event: str, **values: Any) -> None:
        """Tell the parent something; nothing if it has gone."""
        with suppress(OSError):
            os.write(self._events, json.dumps({"event": event, **values}).encode() + b"\n")

    def jobs(self) -> Iterator[dict[str, Any]]:
        """Yield one run after another until the parent has no more, or has gone."""
        while (job := self._jobs.get()) is not None:
            yield job

    def _listen(self) -> None:
        for line in sys.stdin:
            job = json.loads(line)
            if "run" in job:  # from here on, so that no run begins whose parent has gone before it was seen
                self.training = True
            self._jobs.put(job)
        self._jobs.put(None)
        if self.training:  # as on a signal: a checkpoint, then the end
            os.kill(os.getpid(), signal.SIGTERM)
        end, silent = time.monotonic() + PARENT_GONE_S, 0
        while time.monotonic() < end and silent < _RAY_GONE:
            time.sleep(1.0)
            silent = 0 if _listens(os.environ.get("RAY_ADDRESS", "")) else silent + 1
        os._exit(1)


def _listens(address: str) -> bool:
    """Say whether somebody listens at an address, host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return False
    return True


def main(arguments: list[str]) -> int:
    """Train runs until standard input ends."""
    for number in range(3, 64):  # the study's lock, which this process holds by having it open, is not for others
        try:
            os.set_inheritable(number, False)
        except OSError:
            continue
    parent = _Parent(int(arguments[0]))

    from orchestration.cluster.connection import cluster
    from orchestration.cluster.warm import end_kept, kept_warm
    from orchestration.commands.train import train_and_report  # noqa: F401  (for its time)
    from orchestration.tracking.series import one_uploader

    jobs = parent.jobs()
    if (where := next(jobs, None)) is None:  # the study was refused, or has gone
        return 0
    os.environ["RAY_ADDRESS"] = where["ray"]
    with one_uploader(lambda text: parent.say("said", text=text), where["study"]), cluster(None), kept_warm():
        parent.say("ready")
        for job in jobs:
            if "run" not in job:  # nothing to do for a while: others may need the places
                end_kept()
                continue
            outcome = _train(job, parent)
            parent.training = False  # before the parent hears of it, and may send the next
            parent.say("ended", run=job["run"], memory_mib=_memory_mib(), **outcome)
            if outcome["status"] == "stopped" and outcome["problem"] is not None:
                break  # by a signal, which is for this process and not for one run
    return 0


def _train(job: dict[str, Any], parent: _Parent) -> dict[str, Any]:
    """Train one run. Return its status, and its problem if it has one."""
    folder = Path(job["folder"])
    with ExitStack() as stack:
        try:
            stack.enter_context(_output_to(folder / LOG_FILE))
            parent.say("began", run=job["run"])
            code = _carry_out(job, folder)
        except BaseException as problem:
            return _problem(problem)
    return {"status": "finished" if _is_finished(folder) else "stopped", "exit": code, "problem": None}


def _carry_out(job: dict[str, Any], folder: Path) -> int:
    from orchestration.commands.train import train_and_report
    from orchestration.config.compose import compose
    from orchestration.config.folders import digests
    from orchestration.config.messages import say
    from orchestration.storage.run_folder import RunFolder
    from orchestration.studies.shared_stages import take_over_stages

    marks = {"start": time.time(), "command": time.time()}
    sys.argv[1:] = ["train", *job["words"]]  # the command that makes this run alone, for its record
    composed = compose(job["words"])
    marks["config"] = time.time()
    for note in composed.notes:
        say(note)
    # The folder is locked here and again by `train_and_report`, so it is released in between.
    run = RunFolder(folder)
    try:
        run.update_run(study=job["study"], recipe=digests(composed.files))
    finally:
        run.close()
    take_over_stages(composed.config, folder, map(Path, job["donors"]))
    return train_and_report(composed.config, marks, composed.files)


def _is_finished(folder: Path) -> bool:
    from orchestration.storage.files import read_json

    return read_json(folder / "run.json").get("status") == "finished"


def _problem(problem: BaseException) -> dict[str, Any]:
    """Print a problem and return how the run has ended by it."""
    from orchestration.config.messages import in_one_line, say, show
    from orchestration.config.secrets import redact

    code = getattr(problem, "exit_code", None)
    if code is not None or isinstance(problem, KeyboardInterrupt | SystemExit):  # Ray ends a process by the latter
        text = redact(str(problem)) if code is not None else "stopped before it trained"
        say(text)
        return {"status": "stopped", "exit": code or 130, "problem": text}
    told = isinstance(problem, ValueError | FloatingPointError) or type(problem).__name__ == "WorkerLost"
    if told:
        say(str(problem))
    else:
        show("".join(traceback.format_exception(problem)).rstrip(), sys.stderr)
    no_room = any(isinstance(one, OSError) and one.errno in _NO_ROOM for one in (problem, problem.__cause__))
    text = redact(str(problem)) if told else in_one_line(problem)
    no_place = type(problem).__name__ == "NoRoom"
    return {"status": "failed", "exit": 1, "problem": text, "no_room": no_room, "no_place": no_place}


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append all that this process and its libraries print to a file. What a full disk does not take is lost.

    Raises:
        ValueError: the file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ValueError(
            f"{path}: the run's text cannot be written ({error.strerror}); make the file and its folder writable, "
            f"then study.retry=failed trains it again"
        ) from error
    kept = os.dup(1), os.dup(2)
    try:
        for number in (1, 2):
            os.dup2(file, number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
        os.close(file)


def _memory_mib() -> float:
    """Return the memory that this process holds, MiB."""
    import psutil

    return float(psutil.Process().memory_info().rss / 2**20)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
