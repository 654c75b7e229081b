"""The uploading process without its server: memory, a tail of the journal, locks, priority, retries. No MLflow here."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import io
import itertools
import logging
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from orchestration.config.messages import in_one_line
from orchestration.config.secrets import redact
from orchestration.storage import journal
from orchestration.storage.files import read_json, write_json
from orchestration.tracking import contents
from orchestration.tracking.uri import sqlite_path

STATE_FILE = "tracking.json"
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_PASSING = 3  # failures in a row that a server may need to come back
_SCHEMA_WAIT_S = 120.0  # for another process that builds the tables of a store
_log = logging.getLogger("expertail.tracking")


@dataclass(frozen=True)
class Target:
    """The place of a run in MLflow."""

    uri: str
    experiment: str
    run_name: str


class State:
    """The memory of one store in the run folder: the MLflow run, and the digests of files sent. No secrets."""

    def __init__(self, run_dir: Path, target: Target) -> None:
        self._path, self._uri = run_dir / STATE_FILE, target.uri
        self._stores = read_json(self._path)  # with entries of `ownership`, which stay as they are
        self.values: dict[str, Any] = self._stores.setdefault(redact(target.uri), {})
        # One key for all: the same store may be reached by several names.
        keys = [store["key"] for store in self._stores.values() if "key" in store]
        self.values.setdefault("key", keys[0] if keys else uuid.uuid4().hex)
        self.values.setdefault("files", {})

    def agree_on_key(self) -> None:
        """Put the key on disk before an MLflow run carries it; where another process was faster, take its key."""
        on_disk = read_json(self._path).get(redact(self._uri), {})
        self.values.update({name: on_disk[name] for name in ("key", "run_id") if name in on_disk})
        if on_disk.get("key") is None:
            self.save()

    def final_status(self, reported: str | None) -> str | None:
        """Return how the run ended: as reported now, else as reported last, if run.json was not written since.

        A killed driver leaves a run.json that still says running; one that went on has written a newer one.
        """
        versions = [file_version(self._path.parent / name) for name in ("run.json", contents.STUDY_FILE)]
        now = [None if version is None else list(version) for version in versions]  # as JSON gives it back
        if reported is not None:
            self.values.update(status=reported, status_at=now)
        return self.values["status"] if self.values.get("status_at") == now else None

    def save(self) -> None:
        """Write the file as a whole."""
        write_json(self._path, self._stores)


class JournalTail:
    """A reader that follows the journal, also when it is rewound: then a new file has the old name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None  # kept open, so that its inode number cannot be given to the new file
        self._line = 0

    def records(self) -> Iterator[journal.Record]:
        """Yield the complete lines that were added since the last call."""
        with contextlib.suppress(FileNotFoundError):
            now = os.stat(self._path)
            # A journal that was rewound has another inode number.
            if self._file is None or os.fstat(self._file.fileno()).st_ino != now.st_ino:
                if self._file is not None:
                    self._file.close()
                self._file, self._line = open(self._path, "rb"), 0  # noqa: SIM115
        while self._file is not None:
            start = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):  # the writer is not done with it
                self._file.seek(start)
                return
            self._line += 1
            yield journal.parse_line(line, f"{self._path}:{self._line}")

    def __del__(self) -> None:  # no caller has to close it: the file is open for as long as its reader lives
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def hold_lock(path: Path, *, wait_s: float) -> Iterator[bool]:
    """Hold a lock file inside the block. Yield False where it was not free within `wait_s`."""
    deadline = time.monotonic() + wait_s
    with open(path, "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.1)
        yield True


@contextlib.contextmanager
def need_lock(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold a lock file inside the block, which is not entered without it.

    Raises:
        TimeoutError: it was not free within `wait_s`. That passes: whoever sends tries again.
    """
    with hold_lock(path, wait_s=wait_s) as ours:
        if not ours:
            raise TimeoutError(f"{path}: another process has kept it locked for {wait_s:g} s; wait until that one ends")
        yield


@contextlib.contextmanager
def schema_lock(uri: str, folder: Path) -> Iterator[None]:
    """Hold a lock while a store is opened, which may build its tables: two processes must not do so at the same time.

    A server takes care of that itself.

    Args:
        uri: of the store.
        folder: the folder of runs; holds the lock of a database that is not a file.

    Raises:
        TimeoutError: another process has held it for 120 s.
    """
    database = sqlite_path(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    if uri.startswith(("http", "databricks")):
        yield
    else:
        with need_lock(Path(f"{database or folder / '.mlflow'}.lock"), wait_s=_SCHEMA_WAIT_S):
            yield


@contextlib.contextmanager
def request_timeout() -> Iterator[None]:
    """Allow requests 30 s inside the block, unless the operator has set a limit: no training waits for them."""
    given = os.environ.get(TIMEOUT)
    os.environ.setdefault(TIMEOUT, "30")
    try:
        yield
    finally:
        if given is None:
            del os.environ[TIMEOUT]


def set_priority(nice: int) -> None:
    """Yield to training (19), or stop yielding (0), which the system does not allow every user.

    Where the kernel schedules each session as one group, the group's priority counts; elsewhere that of each thread.
    """
    tasks = Path("/proc/self/task")
    for thread in [int(entry.name) for entry in tasks.iterdir()] if tasks.exists() else [0]:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


class Sender(Protocol):
    """The interface between a run folder and a server. Every call may raise."""

    state: State

    @property
    def has_run(self) -> bool: ...
    def connect(self) -> None: ...
    def describe(self) -> None: ...
    def send_points(self, deadline: float) -> bool: ...
    def send_system(self) -> None: ...
    def send_files(self) -> None: ...
    def send_models(self) -> None: ...
    def close(self, status: str | None) -> None: ...


def flush(sender: Sender, wait_s: float, status: str | None) -> str | None:
    """Send everything, trying again until `wait_s` is over. Return None, or what went wrong."""
    if not sender.has_run:
        return None
    status = sender.state.final_status(status)
    deadline = time.monotonic() + wait_s
    problem: str | None = f"not done after {wait_s:.0f} s"
    for attempt in itertools.count():
        try:
            sender.connect()
            sender.describe()
            if sender.send_points(deadline):
                sender.send_files()
                sender.send_models()
                sender.close(status)
                problem = None
        except Exception as error:
            problem = describe_error(error)
            _log.warning("%s", problem)
            if is_permanent(error):
                break
        pause = min(0.5 * 2**attempt, 5.0)
        if problem is None or time.monotonic() + pause >= deadline:
            break
        time.sleep(pause)
    sender.state.values.update(problem=problem)
    sender.state.save()
    return problem


def follow(
    sender: Sender,
    wake: threading.Event,
    *,
    interval_s: float = 2.0,
    system_s: float = 10.0,
    report: Callable[[str], None] = lambda problem: None,
) -> None:
    """Send what arrives until woken. No exception leaves; after failures the pause grows, up to a minute.

    The pause is random by a fifth, so that the uploaders of many runs do not ask a recovered server all at once.

    Once the tracking server shows that the run is there, the process yields to training.

    `report` takes a problem that will not pass by itself, or has not passed at the third attempt, once.
    """
    reported: str | None = None
    failures, system_at, yields = 0, time.monotonic() + system_s, False
    while not wake.is_set():
        if not sender.has_run:
            wake.wait(interval_s)
            continue
        try:
            sender.connect()
            sender.describe()
            if not yields:
                set_priority(19)
                yields = True
            sender.send_points(time.monotonic() + 10.0)
            if time.monotonic() >= system_at:
                system_at = time.monotonic() + system_s
                sender.send_system()
            failures = 0
        except Exception as error:
            failures += 1
            problem = describe_error(error)
            _log.warning("%s (failure %d)", problem, failures)
            if problem != reported and (failures >= _PASSING or is_permanent(error)):
                reported = problem
                report(problem)
        pause = interval_s if failures == 0 else min(2.0**failures, 60.0) * random.uniform(0.8, 1.2)
        wake.wait(pause)


def incomplete_message(run_dir: Path, uri: str, problem: str) -> str:
    """Return the line that tells an operator that a part of a run did not arrive. It holds no secret."""
    text = f"tracking: {redact(uri)} does not have all of this run ({redact(problem)}); later: expertail sync {run_dir}"
    if redact(uri) == uri and not re.search(r"\b40[13]\b", problem):
        return text
    return f"{text} (no password is kept: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or add --uri)"


class RedactedStream(io.TextIOBase):
    """A text stream that takes secrets out of everything written to it, by our code or a library's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        self._stream.flush()
        return len(text)

    def fileno(self) -> int:
        return self._stream.fileno()


def file_version(path: Path) -> tuple[int, int] | None:
    """Return a value that changes whenever a file is written; None when it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def describe_error(error: Exception) -> str:
    """Return an error as one line, with what to do about it."""
    what_to_do = remedy(error)
    # What MLflow advises is longer, and not all of it fits.
    return in_one_line(error).split(". ")[0] + what_to_do if what_to_do else in_one_line(error)


def is_permanent(error: Exception) -> bool:
    """Return whether a repetition cannot help: the store refuses the request, or a file of the run is damaged."""
    if remedy(error):
        return True
    # 408 and 429 are the server's way to ask for patience.
    status = getattr(error, "get_http_status_code", None)
    return isinstance(error, ValueError) if status is None else 400 <= status() < 500 and status() not in (408, 429)


def remedy(error: Exception) -> str:
    """Return what to do about an error of a store that only its owner can mend; nothing about any other."""
    return next((f"; {what}" for sign, what in _REMEDIES.items() if sign in str(error)), "")


_REMEDIES = {
    "database schema": "its tables are another MLflow version's: upgrade it with `mlflow db upgrade <uri>`, take the "
    "MLflow that made it, or set tracking.uri to another store",
    "must be in the 'active' state": "the experiment is deleted: restore it with `mlflow experiments restore "
    "--experiment-id <id>`, or set tracking.experiment to another name",
    "file is not a database": "set tracking.uri to a SQLite file, or to one that does not exist yet",
    "disk image is malformed": "the file is damaged: restore it from a copy, or set tracking.uri to another",
    "readonly database": "make the file and its folder writable, or set tracking.uri to another",
}
"""Remedies, by a piece of what MLflow or SQLite says."""


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield a list in pieces of at most `size` items."""
    yield from (items[start : start + size] for start in range(0, len(items), size))


def user_name() -> str:
    """Return the name of the user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return str(os.getuid())
