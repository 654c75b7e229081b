"""The journal of a run, `metrics.jsonl`: the local truth about every number that training produced.

One JSON object per line, one number per object, appended in the order in which things happened:

    {"time": 1760000000.123, "stage": "train", "epoch": 3, "step": 57, "name": "train/loss", "value": 1.25}

`time` is in unix seconds to the millisecond, `step` counts the optimiser steps done in the stage, from 1. A value that
is not finite is written as null, because JSON has no word for it, and read back as NaN.

Nothing here knows of a server. A reader (the uploader, a person with `tail -f`) may follow the file while it grows: a
line counts once its newline is there. When a run is resumed the journal is rewound to the checkpoint, so that no point
appears twice. A rewound journal is a new file under the old name: a reader that has the old one open can finish it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import time as clock
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from orchestration.storage.files import sync_folder

FILE_NAME = "metrics.jsonl"
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


class Record(NamedTuple):
    """One number of a run: unix seconds, stage, epoch from 1, optimiser steps done in the stage, name, value."""

    time: float
    stage: str
    epoch: int
    step: int
    name: str
    value: float


class Journal:
    """Appends numbers to a run's journal; one process at a time, from any of its threads.

    Lines are kept in memory and written together: at most `flush_s` seconds of them are lost when the process is
    killed, and those come back when the run is resumed from its checkpoint.

    Args:
        run_dir: the run folder; made when missing.
        flush_s: seconds after which `append` writes by itself.

    Raises:
        ValueError: the file cannot be opened for writing.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, flush_s: float = 1.0) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self._flush_s = flush_s
        self._lines: list[str] = []
        self._lock = threading.RLock()  # stages that train side by side write to one journal
        self._written_at = clock.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_partial_line(self.path)
            self._file = os.open(self.path, _APPEND, 0o666)
        except OSError as error:
            raise ValueError(
                f"{self.path}: the journal of the run cannot be written ({error.strerror}); "
                "make the run folder writable, or choose another with run.dir"
            ) from error

    def append(self, stage: str, epoch: int, step: int, values: Mapping[str, float], time: float | None = None) -> None:
        """Record numbers of one moment.

        Args:
            stage: name of the stage.
            epoch: counted from 1.
            step: optimiser steps done in the stage.
            values: number by name; what is not finite is written as null.
            time: unix seconds; now when not given.
        """
        now = round(clock.time() if time is None else time, 3)
        with self._lock:
            for name, number in values.items():
                value = float(number)
                line = {"time": now, "stage": stage, "epoch": epoch, "step": step, "name": name}
                self._lines.append(json.dumps({**line, "value": value if math.isfinite(value) else None}) + "\n")
            if clock.monotonic() - self._written_at >= self._flush_s:
                self.flush()

    def flush(self, *, sync: bool = False) -> None:
        """Write the lines recorded so far; with `sync`, also wait until they are on disk."""
        with self._lock:
            data = memoryview("".join(self._lines).encode())
            while data:  # a write may be short
                data = data[os.write(self._file, data) :]
            self._lines.clear()
            self._written_at = clock.monotonic()
            if sync:
                os.fsync(self._file)

    def sync(self) -> None:
        """Wait until the lines that were written are on disk; those still in memory are not among them.

        Other threads may append meanwhile: the lock is not held while the disk works. A journal that is rewound
        meanwhile is a new file, with these lines, that is on disk before it takes the name.
        """
        with self._lock:
            handle = os.dup(self._file)  # `rewind` and `close` close the other one
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rewind(self, kept_steps: Mapping[str, int], known: Collection[str]) -> int:
        """Drop the lines after the checkpoints of some stages, so that a resumed run can write them again; atomic.

        Args:
            kept_steps: by stage, the optimiser steps done at its checkpoint; lines of later steps are dropped. Stages
                not named stay as they are.
            known: all stages of the run.

        Returns:
            The number of lines dropped.

        Raises:
            ValueError: a stage is not of this run, or the journal is corrupt.
        """
        with self._lock:
            return self._rewind(kept_steps, known)

    def _rewind(self, kept_steps: Mapping[str, int], known: Collection[str]) -> int:
        self.flush()  # lines in memory are subject to it as well
        for stage in kept_steps:
            if stage not in known:
                raise ValueError(f"stage '{stage}' is not a stage of this run, which has {', '.join(known)}")
        dropped = 0
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=FILE_NAME + ".")
        try:
            with open(handle, "wb") as kept:
                for number, line, record in _lines(self.path):
                    if record.stage not in known:
                        raise ValueError(
                            f"{self.path}:{number}: stage '{record.stage}' is not a stage of this run, which has "
                            f"{', '.join(known)}; the folder belongs to another recipe, choose another run.name"
                        )
                    if record.step <= kept_steps.get(record.stage, record.step):
                        kept.write(line)
                    else:
                        dropped += 1
                kept.flush()
                os.fsync(kept.fileno())
            os.chmod(temporary, self.path.stat().st_mode & 0o777)  # mkstemp lets only this user read it
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(self.path.parent)

        # The open file is the old one, which has no name any more.
        os.close(self._file)
        self._file = os.open(self.path, _APPEND, 0o666)
        return dropped

    def close(self) -> None:
        """Write the rest and wait until it is on disk. A second call does nothing."""
        if self._file >= 0:
            self.flush(sync=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the records of a journal in order. A last line without its newline (a killed writer) is left out.

    Args:
        path: the file, or the run folder that holds it. A missing file is an empty journal.

    Raises:
        ValueError: a line is not a record; the message names file and line.
    """
    path = Path(path)
    yield from (record for _, _, record in _lines(path / FILE_NAME if path.is_dir() else path))


def parse_line(line: bytes, place: str) -> Record:
    """Read one line.

    Args:
        line: with or without its newline.
        place: `file:line`, for the message.

    Raises:
        ValueError: the line is not a record of a journal.
    """
    try:
        fields = json.loads(line)
        value = fields["value"]
        return Record(
            float(fields["time"]),
            str(fields["stage"]),
            int(fields["epoch"]),
            int(fields["step"]),
            str(fields["name"]),
            math.nan if value is None else float(value),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: not a line of a journal: {line[:80]!r} ({type(error).__name__}: {error}); needed a JSON object "
            "with time, stage, epoch, step, name and value. Restore the file, or delete this line"
        ) from None


@dataclass
class Series:
    """One metric over time, as parallel lists."""

    epochs: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def series(run_dir: str | os.PathLike[str]) -> dict[str, dict[str, Series]]:
    """Read a run's whole journal, by stage in the order of appearance, then by name.

    Raises:
        ValueError: the journal is corrupt.
    """
    found: dict[str, dict[str, Series]] = {}
    for record in read_journal(run_dir):
        line = found.setdefault(record.stage, {}).setdefault(record.name, Series())
        line.epochs.append(record.epoch)
        line.steps.append(record.step)
        line.values.append(record.value)
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes, Record]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, line, parse_line(line, f"{path}:{number}")


def _drop_partial_line(path: Path) -> None:
    """Cut what a killed writer left after the last newline. Otherwise the next line would be appended to it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        # Backwards in blocks: a journal may have millions of lines, and only the last one matters.
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)
