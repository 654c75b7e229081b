"""Run folders at a URL: whatever fsspec opens, s3://, gs://, abfs://, sftp:// and so on, under the name of the run.

The run works in a copy on the node of its driver, and workers of other nodes hand their files to it through Ray: no
folder need be shared. A thread of its own puts what changed after each checkpoint; training does not wait for it.

    open    lock.json at the URL; then the copy is made new from there, unless it is what was last put there
    put     metrics.jsonl, each new checkpoint with its manifest last, the other files, run.json, storage.json
    close   put the rest, unlock

So the newest checkpoint that is whole there has its journal beside it whenever the driver or its node dies, and
`finished` is written after what was finished. What is there is never renamed or appended to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.checkpoint import MANIFEST
from orchestration.compose import expand
from orchestration.config import RunSettings
from orchestration.journal import FILE_NAME as JOURNAL
from orchestration.run_folder import CONFIG, RUN, RunFolder, write_atomic
from orchestration.store import LOCK, StorageProblem, Store, StoreLock, check_url, copy_of, is_url

if TYPE_CHECKING:
    from orchestration.carry import Carried

INDEX = "storage.json"
_RECORD = ".storage.json"  # in the copy: which states at the URL it comes from
_NOTHING = "nothing"
_CLOSE_S, _RETRY_S, _END_S = 300.0, 10.0, 10.0


class LentRunFolder(RunFolder):
    """A run folder on the driver's node alone: its files reach workers through Ray, and theirs it."""

    shared = False

    def lend(self, path: Path) -> str | Carried:
        """A folder below this one, as objects of Ray."""
        from orchestration.carry import carry

        return carry(path)


class StoredRunFolder(LentRunFolder):
    """The working copy of a run folder that is kept at a URL; held by one process on all nodes.

    Args:
        path: the copy; made if missing, made new if it is not what was last put there.
        url: of the run.

    Raises:
        ValueError: the URL cannot be read or written, or another process holds the run.
    """

    def __init__(self, path: Path, url: str) -> None:
        super().__init__(path)
        try:
            self._store = Store(url)
            self._remote_lock = StoreLock(Store(url), path)
        except BaseException:
            super().close()
            raise
        try:
            self._index = self._fetch()
        except BaseException:
            self._remote_lock.release()
            super().close()
            raise
        self.url = self._store.url
        self._seen: dict[str, tuple[int, int]] = {}
        self._wanted, self._put = 0, 0
        self._problem: str | None = None
        self._closing = False
        self._change = threading.Condition()
        self._sender = threading.Thread(target=self._send, name="storage", daemon=True)
        self._sender.start()

    def saved(self) -> None:
        """Have put what is new; returns at once.

        Raises:
            ValueError: another process has taken the run over.
        """
        if self._remote_lock.lost:
            self._remote_lock.check()
        with self._change:
            self._wanted += 1
            self._change.notify_all()

    def settle(self, wait_s: float | None = None) -> None:
        """Wait until everything is put, at most this long, or five minutes.

        Raises:
            ValueError: it could not be in this time; says why and where it lies.
        """
        wait_s = _CLOSE_S if wait_s is None else wait_s
        self.saved()
        with self._change:
            self._change.wait_for(lambda: self._put >= self._wanted or self._remote_lock.lost, timeout=wait_s)
            if self._put >= self._wanted:
                return
        raise StorageProblem(
            f"{self.url}: what the run wrote last is not there yet ({self._problem or f'not done in {wait_s:g} s'}); "
            f"it is in {self.path} on {platform.node()}; the same command on this node puts it there"
        )

    def close(self) -> None:
        """Let another process hold the run. What `settle` did not wait for is put at the next start on this node."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._sender.join(timeout=_END_S)
        self._remote_lock.release()
        super().close()

    # From there

    def _fetch(self) -> dict[str, Any]:
        """Make the copy new, unless it is what was last put there or goes on from it. Returns the index."""
        index = _json(self._store.read(INDEX))
        state = index.get("state", _NOTHING)
        record = self.path / _RECORD
        known = _json(record.read_bytes() if record.exists() else None).get("states")
        if known is None or state not in known:
            self._record([])  # cut off from here on, the copy is worth nothing
            self._clear()
            names = [name for name in self._store.names() if name not in (INDEX, LOCK)]
            whole = {name.rpartition("/")[0] for name in names if name.endswith(f"/{MANIFEST}")}
            for name in names:
                if not name.startswith("checkpoints/") or name.rpartition("/")[0] in whole:
                    self._store.get(name, self._below(name))
        self._record([state])
        self._states = [state]
        return index

    def _below(self, name: str) -> Path:
        target = self.path / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise StorageProblem(f"{self._store.url}/{name}: leads out of the run folder; remove it")
        return target

    def _record(self, states: list[str]) -> None:
        write_atomic(self.path / _RECORD, json.dumps({"states": states}) + "\n")

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):
                path.unlink()

    # There

    def _send(self) -> None:
        told = None
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._wanted > self._put)
                if self._closing:
                    return
                asked = self._wanted
            try:
                self._synchronise()
            except (ValueError, OSError) as problem:
                self._problem = str(problem)
                if told != self._problem:
                    told = self._problem
                    print(f"expertail: {problem}; training goes on, and it is tried again", file=sys.stderr, flush=True)
                with self._change:
                    self._change.notify_all()
                    self._change.wait_for(lambda: self._closing, timeout=_RETRY_S)
                continue
            self._problem = told = None
            with self._change:
                self._put = asked
                self._change.notify_all()

    def _synchronise(self) -> None:
        """Put what changed. The order is the promise: see the head of this file."""
        self._remote_lock.check()
        files: dict[str, str] = dict(self._index.get("files", {}))
        checkpoints: dict[str, str] = dict(self._index.get("checkpoints", {}))
        local = sorted(self._names())
        last = [name for name in local if name == RUN]
        if JOURNAL in local:
            self._put_file(JOURNAL, files)
        there = self._put_checkpoints(checkpoints)
        for name in [*(n for n in local if n not in (JOURNAL, RUN)), *last]:
            self._put_file(name, files)
        gone = [name for name in files if name not in local]
        state = uuid.uuid4().hex
        index = {
            "state": state,
            "files": {name: digest for name, digest in files.items() if name in local},
            "checkpoints": {name: digest for name, digest in checkpoints.items() if name in there},
        }
        self._remote_lock.check()
        self._states.append(state)  # written or not, as far as a failing answer tells
        self._record(self._states)
        self._store.write(INDEX, (json.dumps(index, indent=1) + "\n").encode())
        self._index, self._states = index, [state]
        self._record([state])
        old = [n for n in self._store.names() if n.startswith("checkpoints/") and n.split("/")[1] not in there]
        self._store.remove([*gone, *sorted(old, key=_end_first)])

    def _names(self) -> Iterator[str]:
        """The files of the copy that are put, but those of checkpoints."""
        for folder, folders, names in os.walk(self.path):
            below = Path(folder).relative_to(self.path)
            folders[:] = [n for n in folders if not n.startswith(".") and (below / n).as_posix() != "checkpoints"]
            for name in names:
                if not name.startswith((".", f"{JOURNAL}.")):
                    yield (below / name).as_posix()

    def _put_file(self, name: str, known: dict[str, str]) -> None:
        path = self.path / name
        try:
            status = path.stat()
            mark = (status.st_size, status.st_mtime_ns)
            if self._seen.get(name) == mark and name in known:
                return
            data = path.read_bytes()
        except FileNotFoundError:  # gone since
            return
        digest = hashlib.sha256(data).hexdigest()
        if known.get(name) != digest:
            self._store.write(name, data)
            known[name] = digest
        self._seen[name] = mark

    def _put_checkpoints(self, known: dict[str, str]) -> set[str]:
        """Put each checkpoint that is new, after the best weights that it names. Returns the names of all there now."""
        there = set()
        of_steps = sorted((self.path / "checkpoints").glob(f"[0-9]*/{MANIFEST}"))
        best = sorted((self.path / "checkpoints").glob(f"best-*/{MANIFEST}"))  # listed last: it has those of all above
        for manifest in best + of_steps:
            folder, name = manifest.parent, manifest.parent.name
            try:
                data = manifest.read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                if known.get(name) != digest:
                    remote = f"checkpoints/{name}"
                    self._store.remove([f"{remote}/{MANIFEST}"])
                    for file in json.loads(data)["files"]:
                        self._store.put(folder / file, f"{remote}/{file}")
                    self._store.write(f"{remote}/{MANIFEST}", data)
                    known[name] = digest
            except (FileNotFoundError, StorageProblem):
                if manifest.exists():
                    raise
                continue  # tidied away meanwhile
            there.add(name)
        return there


@contextlib.contextmanager
def run_at_hand(run: str) -> Iterator[str]:
    """The folder of a run that is given by its path or by its URL; of a URL the copy, and what is new there is put.

    Raises:
        ValueError: there is no run at the URL, or it cannot be read or written, or another process holds it.
    """
    if not is_url(run):
        yield run
        return
    check_url(run, "RUN")
    place, _, name = run.rstrip("/").rpartition("/")
    if Store(run).read(CONFIG) is None:
        raise ValueError(f"{run}: no run there (no {CONFIG}); needed the URL of one, as {place}/<run.name>")
    folder = StoredRunFolder(copy_of(place, expand(RunSettings().local_dir)) / name, run)
    try:
        yield str(folder.path)
        folder.settle()
    finally:
        folder.close()


def _end_first(name: str) -> tuple[bool, bool]:
    """In which order files of checkpoints are removed: none may look whole, or lack its best weights."""
    return name.split("/")[1].startswith("best-"), not name.endswith(f"/{MANIFEST}")


def _json(data: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(data)) if data is not None else {}
    except ValueError:
        return {}
