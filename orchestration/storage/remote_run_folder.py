"""Run folders at a URL: whatever fsspec opens, s3://, gs://, abfs://, sftp:// and so on, under the name of the run.

The run works in a copy on the node of its driver, and workers of other nodes hand their files to it through Ray: no
folder need be shared. A thread of its own puts what changed after each checkpoint; training does not wait for it.

    open    lock.json at the URL; then the copy is made new from there, unless it is what was last put there
    put     metrics.jsonl, each new checkpoint with its manifest last, the other files, run.json, storage.json
    close   put the rest, unlock

So the newest checkpoint that is whole there has its journal beside it whenever the driver or its node dies, and
`finished` is written after what was finished. Training goes on meanwhile: run.json is read before anything else is
looked at, checkpoints are held by links before the journal is read. What is there is never appended to.
"""

from __future__ import annotations

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
from typing import Any

from orchestration.storage.checkpoint import MANIFEST
from orchestration.storage.files import RUN, write_atomic
from orchestration.storage.journal import FILE_NAME as JOURNAL
from orchestration.storage.run_folder import RunFolder
from orchestration.storage.url_lock import LOCK, UrlLock
from orchestration.storage.url_store import StorageProblem, UrlStore

INDEX = "storage.json"
_RECORD = ".storage.json"  # in the copy: which states at the URL it comes from
_HELD = ".putting"
_NOTHING = "nothing"
_CLOSE_S, _RETRY_S, _END_S = 300.0, 10.0, 10.0


class UnsharedRunFolder(RunFolder):
    """A run folder on the driver's node alone. Files travel between it and the workers through Ray."""

    shared = False


class RemoteRunFolder(UnsharedRunFolder):
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
            self._store = UrlStore(url)
            self._remote_lock = UrlLock(UrlStore(url), path)
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
        self._files: dict[str, str] = dict(self._index.get("files", {}))  # sha256 of what is there, by name
        self._kept: dict[str, str] = dict(self._index.get("checkpoints", {}))  # of the manifest, likewise
        self._seen: dict[str, tuple[int, int]] = {}
        self._wanted, self._put = 0, 0
        self._problem: str | None = None
        self._closing = False
        self._change = threading.Condition()
        self._sender = threading.Thread(target=self._send, name="storage", daemon=True)
        self._sender.start()

    def announce_checkpoint(self) -> None:
        """Have put what is new; returns at once.

        Raises:
            ValueError: another process has taken the run over.
        """
        if self._remote_lock.lost:
            self._remote_lock.check()
        with self._change:
            self._wanted += 1
            self._change.notify_all()

    def wait_until_stored(self, wait_s: float | None = None) -> None:
        """Wait until everything is put, at most this long, or five minutes.

        Raises:
            ValueError: it could not be in this time; says why and where it lies.
        """
        wait_s = _CLOSE_S if wait_s is None else wait_s
        self.announce_checkpoint()
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
        self._store.clean()
        if known is None or state not in known:
            names = [name for name in self._store.names() if name not in (INDEX, LOCK)]
            whole = {name.rpartition("/")[0] for name in names if name.endswith(f"/{MANIFEST}")}
            if index.get("checkpoints") and not whole:
                raise StorageProblem(
                    f"{self._store.url}/{INDEX}: lists {len(index['checkpoints'])} checkpoints, and none is whole "
                    f"there; needed one; restore them, or remove the run there to start it anew"
                )
            self._record([])  # cut off from here on, the copy is worth nothing
            self._set_aside()
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

    def _set_aside(self) -> None:
        """Make room for what is there. A copy that may hold more than was put is kept, the last of its kind."""
        aside = self.path.with_name(f".{self.path.name}.replaced")
        found = [path for path in self.path.iterdir() if path.name not in (".lock", _RECORD)]
        if any(self.path.glob(f"checkpoints/[0-9]*/{MANIFEST}")):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            print(
                f"expertail: {self.path}: another start has gone on with the run at {self._store.url} since; this copy "
                f"is made new from there, the old one is in {aside}",
                file=sys.stderr,
                flush=True,
            )
        for path in found:
            if aside.exists():
                os.rename(path, aside / path.name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
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
            except Exception as problem:  # whatever it is, what is there is whole, and the next time may do better
                self._problem = str(problem) or type(problem).__name__
                with self._change:
                    self._change.notify_all()
                    if self._remote_lock.lost:
                        return
                if told != self._problem:
                    told = self._problem
                    print(f"expertail: {told}; training goes on, and it is tried again", file=sys.stderr, flush=True)
                with self._change:
                    self._change.wait_for(lambda: self._closing, timeout=_RETRY_S)
                continue
            self._problem = told = None
            with self._change:
                self._put = asked
                self._change.notify_all()

    def _synchronise(self) -> None:
        """Put what changed. The order is the promise: see the head of this file."""
        self._remote_lock.check()
        run = self.path / RUN
        said = run.read_bytes() if run.exists() else None
        try:
            held = self._hold()
            self._put_file(JOURNAL)
            for folder in held:
                self._put_checkpoint(folder)
        finally:
            shutil.rmtree(self.path / _HELD, ignore_errors=True)
        names = {folder.name for folder in held}
        local = sorted(self._names())
        for name in local:
            if name not in (JOURNAL, RUN):
                self._put_file(name)
        if said is not None:
            self._put_bytes(RUN, said)
        gone = [name for name in self._files if name not in local]
        files = {name: digest for name, digest in self._files.items() if name in local}
        kept = {name: digest for name, digest in self._kept.items() if name in names}
        if (files, kept) != (self._index.get("files", {}), self._index.get("checkpoints", {})):
            self._put_index({"state": uuid.uuid4().hex, "files": files, "checkpoints": kept})
        self._files, self._kept = files, kept
        old = [n for n in self._store.names() if n.startswith("checkpoints/") and n.split("/")[1] not in names]
        self._store.remove([*gone, *sorted(old if names else [], key=_end_first)])

    def _put_index(self, index: dict[str, Any]) -> None:
        """Say there what there is, under a name that the copy knows."""
        self._remote_lock.check()
        self._states.append(index["state"])  # written or not, as far as a failing answer tells
        self._record(self._states)
        self._store.write(INDEX, (json.dumps(index, indent=1) + "\n").encode())
        self._index, self._states = index, [index["state"]]
        self._record(self._states)

    def _hold(self) -> list[Path]:
        """Links to all complete checkpoints, which training may tidy away; best weights before those that name them."""
        held = self.path / _HELD
        while True:
            shutil.rmtree(held, ignore_errors=True)
            try:
                of_steps = sorted((self.path / "checkpoints").glob(f"[0-9]*/{MANIFEST}"))
                best = sorted((self.path / "checkpoints").glob(f"best-*/{MANIFEST}"))  # second: has all of theirs
                return [_linked(manifest.parent, held) for manifest in best + of_steps]
            except FileNotFoundError:  # tidied away, or written anew: look again
                continue

    def _names(self) -> Iterator[str]:
        """The files of the copy that are put, but those of checkpoints."""
        for folder, folders, names in os.walk(self.path):
            below = Path(folder).relative_to(self.path)
            folders[:] = [n for n in folders if not n.startswith(".") and (below / n).as_posix() != "checkpoints"]
            for name in names:
                if not name.startswith((".", f"{JOURNAL}.")):
                    yield (below / name).as_posix()

    def _put_file(self, name: str) -> None:
        """Put a file of the copy if it changed."""
        path = self.path / name
        try:
            status = path.stat()
            mark = (status.st_size, status.st_mtime_ns)
            if self._seen.get(name) == mark and name in self._files:
                return
            data = path.read_bytes()
        except FileNotFoundError:  # gone since
            return
        self._put_bytes(name, data)
        self._seen[name] = mark

    def _put_bytes(self, name: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        if self._files.get(name) != digest:
            self._store.write(name, data)
            self._files[name] = digest

    def _put_checkpoint(self, folder: Path) -> None:
        """Put a held checkpoint, unless it is there."""
        manifest = (folder / MANIFEST).read_bytes()
        digest = hashlib.sha256(manifest).hexdigest()
        if self._kept.get(folder.name) == digest:
            return
        remote = f"checkpoints/{folder.name}"
        self._kept.pop(folder.name, None)
        self._store.remove([f"{remote}/{MANIFEST}"])
        for file in json.loads(manifest)["files"]:
            self._store.put(folder / file, f"{remote}/{file}")
        self._store.write(f"{remote}/{MANIFEST}", manifest)
        self._kept[folder.name] = digest


def _linked(folder: Path, below: Path) -> Path:
    """A checkpoint's files once more, as they are.

    Raises:
        FileNotFoundError: it was taken away or exchanged meanwhile.
    """
    target = below / folder.name
    target.mkdir(parents=True)
    before = folder.stat().st_ino
    for path in folder.iterdir():
        try:
            os.link(path, target / path.name)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(path, target / path.name)
    if folder.stat().st_ino != before:
        raise FileNotFoundError(folder)
    return target


def _end_first(name: str) -> tuple[bool, bool]:
    """In which order files of checkpoints are removed: none may look whole, or lack its best weights."""
    return name.split("/")[1].startswith("best-"), not name.endswith(f"/{MANIFEST}")


def _json(data: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(data)) if data is not None else {}
    except ValueError:
        return {}
