"""Send folders through Ray to workers that do not see the driver's disk, and back, one object per file."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from orchestration.storage.checkpoint import DamagedCheckpoint, FileEntry, write_file


@dataclass(frozen=True)
class Sent:
    """The files of a folder, as objects in Ray.

    Attributes:
        name: of the folder, for messages.
        files: objects that hold the content, by file name.
    """

    name: str
    files: dict[str, ray.ObjectRef[bytes]]


def send(folder: Path, *, shared: bool) -> str | Sent:
    """Make a folder available to workers.

    Args:
        folder: on the driver's disk. Folders inside it are left out.
        shared: whether workers see that disk.

    Returns:
        The path if the disk is shared, else the files as objects, which stay in Ray as long as the result does.
    """
    if shared:
        return str(folder)
    return Sent(folder.name, {p.name: ray.put(p.read_bytes()) for p in sorted(folder.iterdir()) if p.is_file()})


@contextlib.contextmanager
def received(folder: str | Sent, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[str]:
    """Yield the path of a folder on this node. Files that were sent lie there until the context ends.

    Args:
        folder: what `send` returned.
        wanted: whether a file of this name is needed; others are not fetched.
    """
    if isinstance(folder, str):
        yield folder
        return
    with contextlib.ExitStack() as held:
        with _disk_errors_explained():
            path = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="expertail-")), folder.name)
            path.mkdir()  # with the name of the original, which messages show
            for name, content in folder.files.items():
                if wanted(name):
                    (path / name).write_bytes(ray.get(content))
        yield str(path)


def receive_saved(answers: list[tuple[list[FileEntry], dict[str, bytes]]], folder: Path) -> list[FileEntry]:
    """Write the files of a checkpoint that workers sent, and return the entries of all files that they saved.

    Args:
        answers: of `Worker.write`, in the order of ranks.
        folder: to write to.

    Raises:
        DamagedCheckpoint: a file differs from the one that was saved.
    """
    entries = [entry for written, _ in answers for entry in written]
    expected = {entry.name: entry for entry in entries}
    for _, files in answers:
        for name, content in files.items():
            # The hash is the worker's own, so the manifest vouches for what it saved and not for what arrived.
            if write_file(folder, name, content) != expected[name]:
                raise DamagedCheckpoint(f"{folder / name}: changed on its way from its worker; give the command again")
    return entries


@contextlib.contextmanager
def _disk_errors_explained() -> Iterator[None]:
    """Name this node in errors of its disk: an operator would look at the driver's."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{tempfile.gettempdir()} on node {platform.node()}: {error.strerror or error}; needed room for what one "
            f"worker has of a checkpoint, on its way from run.dir; make room, or set TMPDIR where Ray is started"
        ) from error
