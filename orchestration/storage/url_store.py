"""Files at any URL that fsspec opens (s3://, gs://, abfs://, sftp:// ...), read and written by name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_SILENT_S, _KEEP_ALIVE_S = 60.0, 15
# Object stores: a file that is put there is whole or absent, and there are no folders to make.
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss"}
_PART = ".part-"  # in names of files that are being written, where the store has no such promise


class StorageProblem(ValueError):
    """Files at a URL cannot be read or written; says why and what to do."""


def is_url(place: str) -> bool:
    """Say whether a run.dir or a run is given by URL."""
    return "://" in place


def check_url(place: str, key: str = "run.dir") -> None:
    """Refuse a URL that no library here opens, or that would be stored with its password.

    Args:
        place: the URL.
        key: what it was given for, for messages.

    Raises:
        ValueError: says which.
    """
    from fsspec import get_filesystem_class

    if urlsplit(place).password is not None:
        raise ValueError(
            f"{key}: {place.partition(':')[0]}:// with a password in it, which config.yaml would keep; needed a URL "
            f"without one; give the password as that file system's library reads it: a key, its environment, its file"
        )
    scheme = place.partition("://")[0]
    try:
        get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{key} = {place}: {error}; needed a library for {scheme}:// in the environment of this command, as s3fs "
            f"for s3://, gcsfs for gs://, adlfs for abfs://, paramiko for sftp://"
        ) from None


def copy_folder(url: str, local_dir: Path) -> Path:
    """Return the absolute folder for working copies of runs below a URL."""
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    return Path(os.path.abspath(local_dir)) / digest


class UrlStore:
    """Files below a URL, by relative names. Any thread may use it, one at a time. A failed connection is opened again.

    Args:
        url: of the folder.

    Raises:
        StorageProblem: here and in every method, if the file system fails.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._whole = self.url.partition("://")[0] in _WHOLE
        self._using = threading.RLock()
        self._opened: Any = None
        self._made: set[str] = set()
        with self._explain_errors("opened"):
            self._connect()

    def _connect(self) -> None:
        import fsspec

        # fsspec keeps its instances and would hand out the same one again, with its broken connection.
        self._opened, self._root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
        if hasattr(self._opened, "ftp"):  # by itself paramiko waits for ever on a connection that vanished
            self._opened.ftp.get_channel().settimeout(_SILENT_S)
            self._opened.client.get_transport().set_keepalive(_KEEP_ALIVE_S)

    @property
    def _fs(self) -> Any:
        if self._opened is None:
            self._connect()
        return self._opened

    @contextlib.contextmanager
    def _explain_errors(self, what: str, name: str = "") -> Iterator[None]:
        try:
            with self._using:
                yield
        except StorageProblem:
            raise
        except Exception as error:  # every file system has errors of its own
            self._opened = None  # the connection may be broken: the next call opens another
            self._made.clear()
            place = f"{self.url}/{name}" if name else self.url
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise StorageProblem(
                f"{place}: cannot be {what} ({type(error).__name__}: {reason}); needed storage that this node can "
                f"read and write; check the URL in run.dir, the credentials and the network"
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def names(self) -> list[str]:
        """List all files, without those that were put in part."""
        return [name for name in self._all() if _PART not in name]

    def clean(self) -> None:
        """Remove files that were put in part. Call it only while no process is writing."""
        self.remove([name for name in self._all() if _PART in name])

    def _all(self) -> list[str]:
        from fsspec.asyn import AsyncFileSystem

        with self._explain_errors("listed"):
            self._fs.invalidate_cache()  # other nodes write here too
            try:
                # `find` of file systems with folders leaves out those that cannot be listed, and hides the error.
                found = self._fs.find(self._root) if isinstance(self._fs, AsyncFileSystem) else self._below(self._root)
                return sorted(str(path).removeprefix(self._root).lstrip("/") for path in found)
            except FileNotFoundError:
                return []

    def _below(self, folder: str) -> Iterator[str]:
        for entry in self._fs.ls(folder, detail=True):
            if entry["type"] == "directory":
                yield from self._below(entry["name"])
            else:
                yield entry["name"]

    def read(self, name: str) -> bytes | None:
        """Read a file; None if there is no such file."""
        with self._explain_errors("read", name):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Put a file, whole or not at all, in place of what is there."""
        with self._explain_errors("written", name):
            self._make_parent(name)
            if self._whole:
                self._fs.pipe_file(self._path(name), data)
                return

            # Under another name and then moved, as a reader must not see half of a lock or an index.
            part = self._path(f"{name}{_PART}{uuid.uuid4().hex[:8]}")
            try:
                self._fs.pipe_file(part, data)
                self._fs.mv(part, self._path(name))
            except BaseException:
                with contextlib.suppress(Exception):
                    self._fs.rm_file(part)
                raise

    def put(self, source: Path, name: str) -> None:
        """Upload a file that may be large; if interrupted, a part of it may be there."""
        with self._explain_errors("written", name):
            self._make_parent(name)
            self._fs.put_file(str(source), self._path(name))

    def get(self, name: str, target: Path) -> None:
        """Download a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._explain_errors("read", name):
            self._fs.get_file(self._path(name), str(target))

    def remove(self, names: list[str]) -> None:
        """Remove files in this order, and folders that become empty; files that do not exist are skipped."""
        for name in names:
            with self._explain_errors("removed", name), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))
        if not self._whole:
            for parent in {self._path(name).rpartition("/")[0] for name in names if "/" in name}:
                with self._using, contextlib.suppress(Exception):  # there are files in it
                    self._fs.rmdir(parent)
                    self._made.discard(parent)

    def _make_parent(self, name: str) -> None:
        """Make the folder of a file, where the file system has folders."""
        parent = self._path(name).rpartition("/")[0]
        if not self._whole and parent not in self._made:
            self._fs.makedirs(parent, exist_ok=True)
            self._made.add(parent)


def check_access(url: str) -> None:
    """Write a file below a URL, read it and remove it.

    Raises:
        StorageProblem: one of these is not possible.
    """
    store, name, nonce = UrlStore(url), f".expertail-doctor-{uuid.uuid4().hex[:8]}", uuid.uuid4().bytes
    store.write(name, b"to be replaced")
    store.write(name, nonce)
    found = store.read(name)
    store.remove([name])
    if found != nonce:
        raise StorageProblem(f"{url}/{name}: what was read is not what was written; needed storage that keeps files")
