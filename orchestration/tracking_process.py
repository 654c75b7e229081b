"""What the uploading process needs besides a server: memory, a tail of the journal, a lock, manners. No MLflow here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orchestration import journal, tracking_contents
from orchestration.tracking_contents import redact

STATE_FILE = "tracking.json"


@dataclass(frozen=True)
class Target:
    """Where a run is tracked."""

    uri: str
    experiment: str
    run_name: str
    parent: str | None = None
    """MLflow run id of the study's run, None for a run on its own."""


class State:
    """What the run folder remembers of one store: the MLflow run, and the digests of files sent. No secrets."""

    def __init__(self, run_dir: Path, target: Target) -> None:
        self._path = run_dir / STATE_FILE
        self._stores = tracking_contents.read_json(self._path)
        self.values: dict[str, Any] = self._stores.setdefault(redact(target.uri), {})
        self.values.setdefault("key", uuid.uuid4().hex)
        self.values.setdefault("files", {})

    def save(self) -> None:
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


def lower_priority(nice: int = 19) -> None:
    """Yield to training. Where each session is scheduled as one group, the group must yield too."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


def one_line(error: BaseException) -> str:
    """An error as one line without secrets."""
    return redact(f"{type(error).__name__}: {error}".strip().splitlines()[0])[:500]
