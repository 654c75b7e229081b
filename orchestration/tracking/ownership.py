"""Decides which MLflow run a run folder writes to. Two folders must never write to one MLflow run.

The MLflow run is found by a key in the folder's `tracking.json`. Copying a folder copies the key too. So
`tracking.json` also holds the place where the folder was when it was last uploaded. If the folder is elsewhere now:

    nothing with this key is at the old place    the folder was moved: it keeps its MLflow run
    a folder with this key is still there        the folder was copied: it gets an MLflow run of its own
    the old place cannot be looked at from here  the folder may be a copy: it gets an MLflow run of its own

The last case is a place at a URL, in an unreadable folder, or on another host without shared storage. A folder is not
elsewhere if it only has another path, as by a link, nor if it was restored to its old place from a backup.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from orchestration.storage.files import read_json, write_json
from orchestration.tracking.contents import study_folder
from orchestration.tracking.process import STATE_FILE, hold_lock

_WAIT_S = 30.0  # for another process that settles the same folder, which takes milliseconds

FOLDER, COPIED_FROM = "folder", "copied_from"
"""Entries of tracking.json beside those of the stores."""


def settle_ownership(run_dir: Path, url: str | None = None) -> str | None:
    """Note where a folder is, and give it a key of its own if it is a copy.

    The study of a run is settled first: the parent of the run in MLflow is found by the study's key.

    Args:
        run_dir: the folder of a run or of a study.
        url: where the run is kept, of which the folder is a working copy.

    Returns:
        A line that says whether a folder was moved or copied, of both folders; None if they are where they were.

    Raises:
        ValueError: tracking.json is damaged, or another process kept it locked.
        OSError: it cannot be read or written.
    """
    study = study_folder(run_dir) if url is None else None
    lines = [_settle(study, None)] if study is not None else []
    return "\n".join(filter(None, [*lines, _settle(run_dir, url)])) or None


def _settle(run_dir: Path, url: str | None) -> str | None:
    path = run_dir / STATE_FILE
    with hold_lock(run_dir / f".{STATE_FILE}.run.lock", wait_s=_WAIT_S) as ours:
        if not ours:
            raise ValueError(
                f"{path}: another process has kept it locked for {_WAIT_S:g} s; wait until that process ends"
            )
        content = read_json(path)
        here, old = _place(run_dir, url), content.get(FOLDER)
        if here == old:
            return None
        line = None
        if old is not None and not _is_same(old, here):
            keys = {store["key"] for store in content.values() if "key" in store}
            moved = _was_moved(old, here, keys)
            if keys and not moved:
                runs = sorted({store["run_id"] for store in content.values() if "run_id" in store})
                content = {COPIED_FROM: {"place": old["path"], "runs": runs}}
            was = f"{run_dir}: was {'moved' if moved else 'copied'} from {old['path']} on {old['host']}"
            line = f"{was}; it keeps its MLflow run" if moved else f"{was}; this copy gets an MLflow run of its own"
            line = line if keys else None  # nothing was uploaded from there
        write_json(path, {**content, FOLDER: here})
        return line


def copied_from(run_dir: Path) -> dict[str, str]:
    """Return the tags of the MLflow run of a folder that is a copy: where it was copied from, and that one's run."""
    origin = read_json(run_dir / STATE_FILE).get(COPIED_FROM)
    if origin is None:
        return {}
    return {"expertail.copied_from": origin["place"], "expertail.copied_from.run": ",".join(origin["runs"]) or "none"}


def _place(run_dir: Path, url: str | None) -> dict[str, Any]:
    if url is not None:
        return {"path": url, "host": platform.node(), "inode": None}
    return {"path": os.path.abspath(run_dir), "host": platform.node(), "inode": run_dir.stat().st_ino}


def _is_same(old: dict[str, Any], here: dict[str, Any]) -> bool:
    """Return whether two places are one: links, and mounts of one storage at several paths, too."""
    if old["path"] == here["path"]:  # hosts and inodes change where containers mount a storage again
        return True
    try:
        return os.path.samefile(old["path"], here["path"])
    except OSError:
        return False


def _was_moved(old: dict[str, Any], here: dict[str, Any], keys: set[str]) -> bool:
    """Return whether the folder has left its old place for the new one."""
    if old["inode"] is None or here["inode"] is None:  # at a URL: nobody looks there
        return False
    try:
        found = read_json(Path(old["path"]) / STATE_FILE)
    except (OSError, ValueError):  # unreadable is no proof that it has gone
        return False
    if any(store.get("key") in keys for store in found.values()):
        return False
    # A path of another host says nothing, unless both hosts see one storage, where a moved folder keeps its inode.
    return old["host"] == here["host"] or old["inode"] == here["inode"]
