"""Run folders at a URL: any that fsspec opens (s3://, gs://, abfs://, sftp:// ...), under the name of the run.

The run works in a copy on the driver's node, and workers on other nodes send their files to it through Ray, so no
folder need be shared. A thread uploads changes after each checkpoint; training does not wait for it.

    open    write lock.json at the URL; download the run, unless the local copy is current or ahead
    upload  metrics.jsonl, each new checkpoint with its manifest last, the other files, run.json, storage.json
    close   upload the rest, unlock

The order is a promise. Whenever the driver or its node dies, the newest whole checkpoint at the URL has its journal
beside it, and the status `finished` arrives after everything that it promises. Training goes on during an upload. So
run.json is read first, and checkpoints are hard-linked before the journal is read, because training may remove them.
No file at the URL is ever appended to.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestration.config.messages import say
from orchestration.storage.checkpoint import MANIFEST
from orchestration.storage.files import RUN, write_json
from orchestration.storage.journal import FILE_NAME as JOURNAL
from orchestration.storage.run_folder import RunFolder
from orchestration.storage.url_lock import LOCK, UrlLock
from orchestration.storage.url_store import StorageProblem, UrlStore

INDEX = "storage.json"
_RECORD = ".storage.json"  # in the copy: the states at the URL that it may come from
_HELD = ".putting"  # in the copy: links to the checkpoints of the upload in progress
_NOTHING = "nothing"  # the state at a URL without an index
_CLOSE_S = 300.0  # the longest wait for the last upload
_RETRY_S = 10.0  # between two tries of an upload that failed
_END_S = 10.0  # the longest wait for the thread, which may hang in a dead connection


class UnsharedRunFolder(RunFolder):
    """A run folder on the driver's node alone. Files travel between it and the workers through Ray."""

    shared = False


class RemoteRunFolder(UnsharedRunFolder):
    """The working copy of a run folder that is kept at a URL; held by one process on all nodes.

    Args:
        path: the local copy; the run is downloaded unless the copy is current or ahead.
        url: of the run.

    Raises:
        ValueError: the URL cannot be read or written, or another process holds the run.
    """

    def __init__(self, path: Path, url: str) -> None:
        super().__init__(path)
        try:
            self._store = UrlStore(url)
            self._remote_lock = UrlLock(UrlStore(url), path)  # a connection of its own: see there
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
        # Sha256 of what is at the URL: of files by name, of manifests by checkpoint.
        self._files: dict[str, str] = dict(self._index.get("files", {}))
        self._manifests: dict[str, str] = dict(self._index.get("checkpoints", {}))
        self._seen: dict[str, tuple[int, int]] = {}  # size and time of change of files when they were uploaded
        self._wanted, self._put = 0, 0  # how often an upload was asked for, and the last of these that is done
        self._problem: str | None = None  # why the last try failed
        self._closing = False
        self._change = threading.Condition()
        self._sender = threading.Thread(target=self._send, name="storage", daemon=True)
        self._sender.start()

    def announce_checkpoint(self) -> None:
        """Let the thread upload changes; returns at once.

        Raises:
            ValueError: another process has taken the run over.
        """
        if self._remote_lock.lost:
            self._remote_lock.check()
        with self._change:
            self._wanted += 1
            self._change.notify_all()

    def wait_until_stored(self, wait_s: float | None = None) -> None:
        """Wait until everything is uploaded, at most this long, or five minutes.

        Raises:
            ValueError: it took longer or failed; says why, and where the files are.
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
        """Let another process hold the run. The next start on this node uploads what is not at the URL by then."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._sender.join(timeout=_END_S)
        self._remote_lock.release()
        super().close()

    # Download

    def _fetch(self) -> dict[str, Any]:
        """Download the run unless the local copy is current or ahead. Returns the index at the URL."""
        index = _json(self._store.read(INDEX))
        state = index.get("state", _NOTHING)
        record = self.path / _RECORD
        known = _json(record.read_bytes() if record.exists() else None).get("states")
        self._store.clean()  # the lock is ours, so nobody is writing

        # The copy is current or ahead if it wrote the state at the URL. Else another node has gone on with the run.
        if known is None or state not in known:
            names = [name for name in self._store.names() if name not in (INDEX, LOCK)]
            whole = {name.rpartition("/")[0] for name in names if name.endswith(f"/{MANIFEST}")}
            if index.get("checkpoints") and not whole:
                raise StorageProblem(
                    f"{self._store.url}/{INDEX}: lists {len(index['checkpoints'])} checkpoints, and none is whole "
                    f"there; needed one; restore them, or remove the run there to start it again"
                )
            self._record([])  # an interrupted download leaves a copy that must not be taken for current
            self._set_aside()
            for name in names:
                # Of a checkpoint without a manifest the upload was interrupted.
                if not name.startswith("checkpoints/") or name.rpartition("/")[0] in whole:
                    self._store.get(name, self._below(name))
        self._record([state])
        self._states = [state]
        return index

    def _below(self, name: str) -> Path:
        """Return the local path of a file at the URL, which others may have written: it must not lead elsewhere."""
        target = self.path / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise StorageProblem(f"{self._store.url}/{name}: leads out of the run folder; remove it")
        return target

    def _record(self, states: list[str]) -> None:
        write_json(self.path / _RECORD, {"states": states})

    def _set_aside(self) -> None:
        """Make room for the download. A copy that may hold more than the URL is kept beside it, one at most."""
        aside = self.path.with_name(f".{self.path.name}.replaced")
        found = [path for path in self.path.iterdir() if path.name not in (".lock", _RECORD)]
        if any(self.path.glob(f"checkpoints/[0-9]*/{MANIFEST}")):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            say(
                f"{self.path}: another start has gone on with the run at {self._store.url} since; this copy "
                f"is replaced by a download from there, the old one is in {aside}"
            )
        for path in found:
            if aside.exists():
                os.rename(path, aside / path.name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    # Upload

    def _send(self) -> None:
        """Upload whenever it is asked for, and again after a failure, until the folder is closed or the lock lost."""
        reported = None
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._wanted > self._put)
                if self._closing:
                    return
                asked = self._wanted  # what is asked for during the upload takes another one
            try:
                self._synchronise()
            except Exception as problem:  # the files at the URL are whole whatever it was, and a later try may succeed
                self._problem = str(problem) or type(problem).__name__
                with self._change:
                    self._change.notify_all()
                    if self._remote_lock.lost:
                        return
                if reported != self._problem:
                    reported = self._problem
                    say(f"{reported}; training goes on; trying again")
                with self._change:
                    self._change.wait_for(lambda: self._closing, timeout=_RETRY_S)
                continue
            self._problem = reported = None
            with self._change:
                self._put = asked
                self._change.notify_all()

    def _synchronise(self) -> None:
        """Upload changes. The order is the promise at the head of this file."""
        self._remote_lock.check()

        # Read first, written last: a `finished` that arrives while the rest is uploaded waits for the next upload.
        run = self.path / RUN
        said = run.read_bytes() if run.exists() else None

        # The journal is read after the checkpoints are held, so it has the lines of each of them.
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
        manifests = {name: digest for name, digest in self._manifests.items() if name in names}
        if (files, manifests) != (self._index.get("files", {}), self._index.get("checkpoints", {})):
            self._put_index({"state": uuid.uuid4().hex, "files": files, "checkpoints": manifests})
        self._files, self._manifests = files, manifests

        # Last: whatever the index named until now stays until the new index is there.
        old = [n for n in self._store.names() if n.startswith("checkpoints/") and n.split("/")[1] not in names]
        self._store.remove([*gone, *sorted(old if names else [], key=_end_first)])

    def _put_index(self, index: dict[str, Any]) -> None:
        """Write the index, under a new state that the local copy remembers as its own."""
        self._remote_lock.check()
        self._states.append(index["state"])  # before the write: one that fails may still have arrived
        self._record(self._states)
        self._store.write(INDEX, (json.dumps(index, indent=1) + "\n").encode())
        self._index, self._states = index, [index["state"]]
        self._record(self._states)

    def _hold(self) -> list[Path]:
        """Link all complete checkpoints, which training may remove; best weights before those that name them."""
        held = self.path / _HELD
        while True:
            shutil.rmtree(held, ignore_errors=True)
            try:
                of_steps = sorted((self.path / "checkpoints").glob(f"[0-9]*/{MANIFEST}"))
                best = sorted((self.path / "checkpoints").glob(f"best-*/{MANIFEST}"))  # second: has all they name
                return [_link(manifest.parent, held) for manifest in best + of_steps]
            except FileNotFoundError:  # removed or replaced meanwhile: look again
                continue

    def _names(self) -> Iterator[str]:
        """Yield the files to upload, without those of checkpoints."""
        for folder, folders, names in os.walk(self.path):
            below = Path(folder).relative_to(self.path)
            folders[:] = [n for n in folders if not n.startswith(".") and (below / n).as_posix() != "checkpoints"]
            for name in names:
                if not name.startswith((".", f"{JOURNAL}.")):
                    yield (below / name).as_posix()

    def _put_file(self, name: str) -> None:
        """Upload a file if it changed."""
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
        """Upload a linked checkpoint, unless it is there. Without its manifest, which comes last, it is not whole."""
        manifest = (folder / MANIFEST).read_bytes()
        digest = hashlib.sha256(manifest).hexdigest()
        if self._manifests.get(folder.name) == digest:
            return
        # Another one of this name loses its manifest first: it must not look whole with some files of each.
        remote = f"checkpoints/{folder.name}"
        self._manifests.pop(folder.name, None)
        self._store.remove([f"{remote}/{MANIFEST}"])
        for file in json.loads(manifest)["files"]:
            self._store.put(folder / file, f"{remote}/{file}")
        self._store.write(f"{remote}/{MANIFEST}", manifest)
        self._manifests[folder.name] = digest


def _link(folder: Path, below: Path) -> Path:
    """Link a checkpoint's files into another folder.

    Raises:
        FileNotFoundError: it was removed or replaced meanwhile.
    """
    target = below / folder.name
    target.mkdir(parents=True)
    before = folder.stat().st_ino  # a checkpoint that replaces this one meanwhile has the name, but another inode
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
    """Order the removal of checkpoints' files: manifests first, so that none looks whole; best weights last."""
    return name.split("/")[1].startswith("best-"), not name.endswith(f"/{MANIFEST}")


def _json(data: bytes | None) -> dict[str, Any]:
    try:
        return dict(json.loads(data)) if data is not None else {}
    except ValueError:
        return {}
