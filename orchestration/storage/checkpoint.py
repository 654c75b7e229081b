"""Checkpoints: folders of safetensors and JSON that are either complete or not there.

    checkpoints/00-train-00000480/      stage 0 "train", 480 optimiser steps done
        trunk.safetensors  expert0.safetensors ...              weights and BatchNorm statistics, one file per expert
        trunk.momentum.safetensors  expert0.momentum.safetensors ...
        shared.safetensors  objective.safetensors               heads and routers after all experts; where there are any
        state.json                                              counters, running sums, the best evaluation so far
        manifest.json                                           format, size and sha256 of every other file
    checkpoints/best-00-train-00000480/  the same without momentum

Writing. Everything goes to a folder `.writing-*` and is flushed to disk. Then the folder is renamed: a checkpoint under
its final name is complete. Tensors are whole, so it loads on any mesh.

Reading. A file may have been damaged since. Looking for the newest checkpoint compares names, sizes and the hash of
state.json with the manifest. Before tensors are loaded, the driver hashes every byte, once. A damaged checkpoint is
named and passed over before any worker has read a part of it, and the one before it loads. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.storage.files import file_sha256, sync_folder

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
_REPLACED = ".replaced-"


class DamagedCheckpoint(ValueError):
    """A checkpoint is not as its manifest says."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint, as its manifest lists it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and the contents of its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the stage was trained to its end."""
        return bool(self.state["step"] >= self.state["total_steps"])


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Any]) -> FileEntry:
    """Write tensors to `<folder>/<name>.safetensors` and flush it to disk."""
    from safetensors.torch import save

    return write_file(folder, f"{name}.safetensors", save({key: t.contiguous() for key, t in tensors.items()}))


def read_tensors(folder: Path, name: str) -> dict[str, Any]:
    """Read the tensors of `<folder>/<name>.safetensors` to the CPU; {} if there is no such file.

    Raises:
        DamagedCheckpoint: it is not a file of tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{name}.safetensors"
    try:
        return load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise DamagedCheckpoint(
            f"{path}: not a file of tensors ({error}); restore it from a copy, or remove {folder}"
        ) from None


def write_file(folder: Path, name: str, data: bytes | memoryview) -> FileEntry:
    """Write a file and flush it to disk."""
    with open(folder / name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return entry_of(name, data)


def entry_of(name: str, data: bytes | memoryview) -> FileEntry:
    """Return the entry of a file with this content."""
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


class Checkpoints:
    """The checkpoints of one run. The run's lock ensures that one process at a time writes them."""

    def __init__(self, run_dir: Path, stages: list[str]) -> None:
        self.folder = run_dir / "checkpoints"
        self.stages = stages

    def name(self, stage: str, step: int) -> str:
        """Return a folder name; names sort in the order of training."""
        return f"{self.stages.index(stage):02d}-{stage}-{step:08d}"

    def begin(self) -> Path:
        """Make a new folder for workers to write their files to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = self.folder / f".writing-{uuid.uuid4().hex[:12]}"
        folder.mkdir()
        return folder

    def complete(self, writing: Path, name: str, entries: list[FileEntry], state: dict[str, Any]) -> Path:
        """Add state and manifest, flush, and give the folder its name: from here on the checkpoint exists."""
        entries = [*entries, write_file(writing, STATE, json.dumps(state, indent=1).encode())]
        files = {e.name: {"size": e.size, "sha256": e.sha256} for e in sorted(entries, key=lambda e: e.name)}
        write_file(writing, MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())
        sync_folder(writing)  # before the rename: else a crash could leave the final name without some of its files

        final, old = self.folder / name, self.folder / f"{_REPLACED}{name}"
        if final.exists():  # saved at this step before; set aside, since a folder cannot be renamed onto one with files
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)  # killed from here on, `recover` gives it its name back
        os.rename(writing, final)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        return final

    def recover(self) -> None:
        """Undo a replacement that was cut off between its two renames."""
        for old in self.folder.glob(f"{_REPLACED}*"):
            name = old.name.removeprefix(_REPLACED)
            if (self.folder / name).exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(old, self.folder / name)

    def copy_weights(self, source: Path, name: str) -> Path:
        """Copy the weights and the state of a complete checkpoint under another name.

        Every byte is hashed on the way: a copy with a manifest of its own would otherwise pass damage off as whole.

        Raises:
            DamagedCheckpoint: a file has changed since it was written.
        """
        writing = self.begin()
        listed = _manifest(source)["files"]
        entries = []
        for file, entry in listed.items():
            if file != STATE and not _is_momentum(file):
                copied = write_file(writing, file, (source / file).read_bytes())
                if copied.sha256 != entry["sha256"]:
                    raise DamagedCheckpoint(f"{source / file}: changed since it was written; see {MANIFEST}")
                entries.append(copied)
        return self.complete(writing, name, entries, json.loads((source / STATE).read_text()))

    def newest(self, stage: str, report: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest checkpoint of a stage that looks whole; None if there is none.

        Manifests, sizes and state.json decide. Damaged ones are reported and passed over. Before tensors are loaded,
        `newest_verified` reads the rest.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        return self._newest(stage, report, inspect)

    def newest_verified(self, stage: str, report: Callable[[str], None]) -> Checkpoint | None:
        """Return the checkpoint to load: the newest in which every byte is as its manifest says. See `newest`."""
        return self._newest(stage, report, verify)

    def newest_finished(self, stage: str, report: Callable[[str], None]) -> Checkpoint | None:
        """Return the last checkpoint of a stage, verified; None if the stage has not been trained to its end.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        looked_at = self.newest(stage, lambda _: None)
        if looked_at is None or not looked_at.finished:
            return None  # its training will go on, and what it loads is verified then
        newest = self.newest_verified(stage, report)
        return newest if newest is not None and newest.finished else None

    def _newest(
        self, stage: str, report: Callable[[str], None], check: Callable[[Path], dict[str, Any]]
    ) -> Checkpoint | None:
        damaged = []
        for folder in self._of(stage):
            try:
                return Checkpoint(folder, check(folder))
            except DamagedCheckpoint as problem:
                damaged.append(str(problem))
                report(f"damaged checkpoint passed over: {problem}")
        if damaged:
            raise ValueError(
                f"{self.folder}: no checkpoint of stage {stage} is whole ({'; '.join(damaged)}); needed one; restore "
                f"it from a copy, or remove {self.folder.parent} to start the run again"
            )
        return None

    def _of(self, stage: str) -> list[Path]:
        """Folders of a stage's checkpoints, newest first."""
        return sorted(self.folder.glob(f"{self.stages.index(stage):02d}-{stage}-" + "[0-9]" * 8), reverse=True)

    def clean(self) -> None:
        """Undo what a killed writer left: half-written folders, and a replacement between its two renames.

        Call it only while no process is writing.
        """
        if not self.folder.is_dir():
            return
        self.recover()
        for folder in self.folder.glob(".writing-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def prune(self, stage: str, written: Path, keep: int) -> None:
        """Remove all but some checkpoints of a stage, and best weights that none of those names.

        Args:
            stage: its name.
            written: the checkpoint just written.
            keep: how many stay: this one and those before it.
        """
        complete = self._of(stage)
        # A newer one was found damaged when the stage resumed, or training would have gone on from it. If it counted
        # among those that stay, it could push out the last whole one.
        newest = complete.index(written)
        kept = complete[newest : newest + keep]
        for folder in complete:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

        wanted = set()
        for folder in kept:
            try:
                best = json.loads((folder / STATE).read_text()).get("best")
            except (OSError, ValueError):
                return  # damaged: `newest` will report it; until then its best weights may be needed for a repair
            if best:
                wanted.add(best["checkpoint"])
        for folder in self.folder.glob(f"best-{self.stages.index(stage):02d}-{stage}-" + "[0-9]" * 8):
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)


def inspect(folder: Path) -> dict[str, Any]:
    """Check the sizes of a checkpoint's files, and return its state. Tensors are not read.

    Raises:
        DamagedCheckpoint: names the file, what was found and what was needed.
    """
    files = _manifest(folder)["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path}: missing; needed {entry['size']} bytes")
        if path.stat().st_size != entry["size"]:
            raise DamagedCheckpoint(f"{path}: {path.stat().st_size} bytes; needed {entry['size']}")
    _check_hash(folder / STATE, files[STATE])
    return _state(folder / STATE)


def verify(folder: Path, *, momentum: bool = True) -> dict[str, Any]:
    """Check a checkpoint against its manifest, byte by byte, and return its state.

    Args:
        folder: of the checkpoint.
        momentum: whether momentum will be loaded too; if not, only the sizes of its files are checked.

    Raises:
        DamagedCheckpoint: names the file, what was found and what was needed.
    """
    state = inspect(folder)
    for name, entry in _manifest(folder)["files"].items():
        if name != STATE and (momentum or not _is_momentum(name)):
            _check_hash(folder / name, entry)
    return state


def _check_hash(path: Path, entry: dict[str, Any]) -> None:
    found = file_sha256(path)
    if found != entry["sha256"]:
        raise DamagedCheckpoint(f"{path}: sha256 {found[:12]}...; needed {entry['sha256'][:12]}...")


def _is_momentum(file: str) -> bool:
    return ".momentum." in file


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
        best = state.get("best")
        plain = best is None or _is_plain(best["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: not a readable state ({type(error).__name__})") from error
    if not plain:
        raise DamagedCheckpoint(f"{path}: names {best['checkpoint']!r} as the best weights; needed a folder beside it")
    return state


def _is_plain(name: Any) -> bool:
    """Say whether a name is a plain file name, not a path that leads out of the folder."""
    return isinstance(name, str) and name == Path(name).name and name.isprintable() and name[:1] not in ("", ".")


def _manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest. Its names are used to open, copy and upload files, so none may lead out of the folder."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        if STATE not in files or not all({"size", "sha256"} <= e.keys() for e in files.values()):
            raise ValueError("an entry is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: not a readable manifest ({type(error).__name__})") from error
    paths = [name for name in files if not _is_plain(name)]
    if paths:
        raise DamagedCheckpoint(f"{path}: lists {paths[0]!r}; needed names of files beside it")
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}")
    return manifest
