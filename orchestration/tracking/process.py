"""What the uploading process needs besides a server: memory, a tail of the journal, a lock, manners. No MLflow here."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import io
import itertools
import json
import logging
import os
import random
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from orchestration.config.secrets import redact
from orchestration.storage import journal
from orchestration.storage.files import read_json
from orchestration.tracking import contents
from orchestration.tracking.uri import sqlite_path

STATE_FILE = "tracking.json"
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_log = logging.getLogger("expertail.tracking")


@dataclass(frozen=True)
class Target:
    """Where a run is tracked."""

    uri: str
    experiment: str
    run_name: str


class State:
    """What the run folder remembers of one store: the MLflow run, and the digests of files sent. No secrets."""

    def __init__(self, run_dir: Path, target: Target) -> None:
        self._path, self._uri = run_dir / STATE_FILE, target.uri
        self._stores = read_json(self._path)
        self.values: dict[str, Any] = self._stores.setdefault(redact(target.uri), {})
        # One key for all: the same store may be reached by several names.
        keys = [store["key"] for store in self._stores.values() if "key" in store]
        self.values.setdefault("key", keys[0] if keys else uuid.uuid4().hex)
        self.values.setdefault("files", {})

    def keep_key(self) -> None:
        """Have the key on disk before a run carries it; where another process was faster, take its key."""
        kept = read_json(self._path).get(redact(self._uri), {})
        self.values.update({name: kept[name] for name in ("key", "run_id") if name in kept})
        self.save()

    def ending(self, said: str | None) -> str | None:
        """How the run ended: as is said now, else as was said last where run.json has not been written since.

        A driver that was killed left a run.json that still says running; one that went on wrote a newer one.
        """
        written = [stamp(self._path.parent / name) for name in ("run.json", contents.STUDY_FILE)]
        now = [None if found is None else list(found) for found in written]  # as JSON gives it back
        if said is not None:
            self.values.update(status=said, status_at=now)
        return self.values["status"] if self.values.get("status_at") == now else None

    def save(self) -> None:
        """Write the file, whole."""
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{STATE_FILE}.")
        with open(handle, "w") as file:
            json.dump(self._stores, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, self._path)


class Tail:
    """Follows the journal, also when it is rewound: that is a new file under the old name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None  # kept open, so that its inode number cannot be given to the new file
        self._line = 0

    def records(self) -> Iterator[journal.Record]:
        """Yield the complete lines that are new since the last call."""
        with contextlib.suppress(FileNotFoundError):
            now = os.stat(self._path)
            if self._file is None or os.fstat(self._file.fileno()).st_ino != now.st_ino:
                if self._file is not None:
                    self._file.close()
                self._file, self._line = open(self._path, "rb"), 0  # noqa: SIM115
        while self._file is not None:
            start = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(start)
                return
            self._line += 1
            yield journal.parse_line(line, f"{self._path}:{self._line}")

    def __del__(self) -> None:  # the file is open for as long as somebody follows
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def locked(path: Path, *, wait_s: float) -> Iterator[bool]:
    """Hold a lock file; yields whether it was free within `wait_s`."""
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
def building_tables(uri: str, folder: Path) -> Iterator[None]:
    """Hold a lock where opening a store may build its tables, which two processes must not do at the same time.

    A server sees to that by itself.

    Args:
        uri: of the store.
        folder: of runs; the lock of a database that is not a file lies there.
    """
    database = sqlite_path(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    if uri.startswith(("http", "databricks")):
        yield
    else:
        with locked(Path(f"{database or folder / '.mlflow'}.lock"), wait_s=120.0):
            yield


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Requests may take 30 s, where the operator has not set another limit: no training waits for them."""
    given = os.environ.get(TIMEOUT)
    os.environ.setdefault(TIMEOUT, "30")
    try:
        yield
    finally:
        if given is None:
            del os.environ[TIMEOUT]


def set_priority(nice: int) -> None:
    """Yield to training (19), or stop yielding (0), which not every user may.

    Where each session is scheduled as one group, the group's number counts; elsewhere the threads' own.
    """
    tasks = Path("/proc/self/task")
    for thread in [int(entry.name) for entry in tasks.iterdir()] if tasks.exists() else [0]:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


class Sender(Protocol):
    """What brings a run folder and a server together. Every call may raise."""

    state: State

    @property
    def begun(self) -> bool: ...
    def connect(self) -> None: ...
    def describe(self) -> None: ...
    def send_points(self, deadline: float) -> bool: ...
    def send_system(self) -> None: ...
    def send_files(self) -> None: ...
    def send_models(self) -> None: ...
    def close(self, status: str | None) -> None: ...


def flush(sender: Sender, wait_s: float, status: str | None) -> str | None:
    """Send everything, trying again until `wait_s` is over; None, or what went wrong."""
    if not sender.begun:
        return None
    status = sender.state.ending(status)
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
            problem = one_line(error)
            _log.warning("%s", problem)
            if is_final(error):
                break
        pause = min(0.5 * 2**attempt, 5.0)
        if problem is None or time.monotonic() + pause >= deadline:
            break
        time.sleep(pause)
    sender.state.values.update(problem=problem)
    sender.state.save()
    return problem


def follow(sender: Sender, wake: threading.Event, *, interval_s: float = 2.0, system_s: float = 10.0) -> None:
    """Send what comes until woken. No exception leaves; a failing server is asked ever more rarely, up to a minute."""
    failures, system_at = 0, time.monotonic() + system_s
    while not wake.is_set():
        if not sender.begun:
            wake.wait(interval_s)
            continue
        try:
            sender.connect()
            sender.describe()
            sender.send_points(time.monotonic() + 10.0)
            if time.monotonic() >= system_at:
                system_at = time.monotonic() + system_s
                sender.send_system()
            failures = 0
        except Exception as error:
            failures += 1
            _log.warning("%s (failure %d)", one_line(error), failures)
        pause = interval_s if failures == 0 else min(2.0**failures, 60.0) * random.uniform(0.8, 1.2)
        wake.wait(pause)


def incomplete(run_dir: Path, uri: str, problem: str) -> str:
    """What an operator is told when something of a run did not arrive: one line without secrets."""
    text = f"tracking: {redact(uri)} does not have all of this run ({redact(problem)}); later: expertail sync {run_dir}"
    if redact(uri) == uri and not re.search(r"\b40[13]\b", problem):
        return text
    return f"{text} (no password is kept: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or add --uri)"


class WithoutSecrets(io.TextIOBase):
    """A text stream that takes secrets out of what is written to it, by whatever library."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        self._stream.flush()
        return len(text)

    def fileno(self) -> int:
        return self._stream.fileno()


def stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written; None when it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def one_line(error: BaseException) -> str:
    """An error as one line without secrets."""
    return redact(f"{type(error).__name__}: {error}".strip().splitlines()[0])[:500]


def is_final(error: Exception) -> bool:
    """Whether trying again cannot help: the server refuses what it is asked, or a file of the run is damaged."""
    status = getattr(error, "get_http_status_code", None)
    return isinstance(error, ValueError) if status is None else 400 <= status() < 500 and status() not in (408, 429)


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Pieces of a list."""
    yield from (items[start : start + size] for start in range(0, len(items), size))


def user() -> str:
    """The name of who runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return str(os.getuid())
