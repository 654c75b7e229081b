"""Folders on their way to workers that do not see the driver's disk: through Ray's object store, a file an object."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestration.storage.checkpoint import DamagedCheckpoint, FileEntry, write_file


@dataclass(frozen=True)
class Sent:
    """A folder's files, as objects.

    Attributes:
        name: of the folder, for messages.
        files: objects that hold the content, by file name.
    """

    name: str
    files: dict[str, ray.ObjectRef[bytes]]


def send(folder: Path, *, shared: bool) -> str | Sent:
    """A folder for workers: its path where they share the disk, else its files, handed to Ray.

    Files stay in Ray as long as the result does. Folders in the folder are left out.
    """
    if shared:
        return str(folder)
    return Sent(folder.name, {p.name: ray.put(p.read_bytes()) for p in sorted(folder.iterdir()) if p.is_file()})


@contextlib.contextmanager
def received(folder: str | Sent, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[str]:
    """Yield a folder's path on this node; the files of a sent one lie there until the context ends.

    Args:
        folder: a path that this node sees, or what was sent.
        wanted: which files, by name; others are not fetched.
    """
    if isinstance(folder, str):
        yield folder
        return
    with contextlib.ExitStack() as held:
        with _explained():
            path = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="expertail-")), folder.name)
            path.mkdir()
            for name, content in folder.files.items():
                if wanted(name):
                    (path / name).write_bytes(ray.get(content))
        yield str(path)


def receive_saved(
    answers: list[tuple[list[FileEntry], dict[str, Any], dict[str, bytes]]], folder: Path
) -> list[FileEntry]:
    """All files that workers saved, from the answers of `Worker.save`; those that they handed over are written here.

    Raises:
        DamagedCheckpoint: a file is not the one that was saved.
    """
    entries = [entry for written, _, _ in answers for entry in written]
    expected = {entry.name: entry for entry in entries}
    for _, _, files in answers:
        for name, content in files.items():
            if write_file(folder, name, content) != expected[name]:
                raise DamagedCheckpoint(f"{folder / name}: changed on its way from its worker; give the command again")
    return entries


def save_to_send(save: Callable[[str], list[FileEntry]]) -> tuple[list[FileEntry], dict[str, bytes]]:
    """What `save` returns for a folder of this node, and the content of the files it wrote there."""
    with _explained(), tempfile.TemporaryDirectory(prefix="expertail-") as scratch:
        entries = save(scratch)
        return entries, {path.name: path.read_bytes() for path in Path(scratch).iterdir()}


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Name this node's disk where it fails: the driver's is another."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{tempfile.gettempdir()} on node {platform.node()}: {error.strerror or error}; needed room for what one "
            f"worker has of a checkpoint, on its way to or from run.dir; make room, or set TMPDIR where Ray is started"
        ) from error
