"""The files of a run folder: their names, how they are written and read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from experts.data.names import HANDLER

CONFIG, RUN, DATA, LOCK = "config.yaml", "run.json", "data.json", ".lock"
_SWEEP = "sweep.json"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing; see `writing_whole`."""
    with writing_whole(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors=HANDLER))


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a scratch file beside a file; at the end it is flushed to disk, then renamed onto it, or else removed."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write an object as indented JSON, a whole file or nothing."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk. Without it a rename may be undone by a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; {} if the file is missing.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found {type(value).__name__}, needed a JSON object; restore the file")
    return value


def refuse_sweep(folder: Path) -> None:
    """Refuse a folder that an earlier version's `expertail sweep` has left: its runs lie beside it, not in it.

    Raises:
        ValueError: it is one, with the command that compares its runs.
    """
    if (folder / _SWEEP).is_file():
        runs = " ".join(str(folder.parent / str(run.get("run"))) for run in read_json(folder / _SWEEP).get("runs", ()))
        raise ValueError(
            f"{folder}: found a sweep of an earlier version ({_SWEEP}); needed a study or runs. Its runs are whole: "
            f"expertail report {runs}"
        )


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read the resolved config of a run; {} if there is none yet."""
    import yaml

    path = run_dir / CONFIG
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def evaluations(run_dir: Path, stage: str = "") -> dict[str, dict[str, Any]]:
    """Read the evaluations of "last" and "best" that exist: of the run, or of one of several final stages."""
    found = {which: read_json(run_dir / "evaluation" / stage / f"{which}.json") for which in ("last", "best")}
    return {which: evaluation for which, evaluation in found.items() if evaluation}


def final_evaluations(run_dir: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read the evaluations of every final stage that has any, in the order of the recipe.

    The result is empty where the recipe has one final stage: its evaluations are the run's.
    """
    stages = (read_config(run_dir).get("method") or {}).get("stages") or {}
    # A stage that knows only some classes has a folder of evaluations too, but is no result of the run.
    whole = [stage for stage, settings in stages.items() if (settings or {}).get("classes") is None]
    return {stage: found for stage in whole if (found := evaluations(run_dir, stage))}
