"""Who holds the folder of a run or a study. Its lock is not touched: looking must not be in the way of a start."""

from __future__ import annotations

import contextlib
import platform
import re
from pathlib import Path

import psutil

_NOTED_S = 2.0  # by which the clocks of a process's start and of a file's change may differ


def holder(lock: Path) -> str | None:
    """Return who holds a lock file, "process 12 on host"; None where nobody does, as far as can be told from here.

    A process of another host cannot be looked at: it counts as one that holds.
    """
    try:
        line = next(iter(lock.read_text(errors="replace").splitlines()), "")
        changed = lock.stat().st_mtime
    except OSError:
        return None
    found = re.fullmatch(r"process (\d+) on (.*)", line)
    if found is None:
        return None
    if found[2] != platform.node():
        return f"{line}, if it still lives: that host cannot be looked at from here"
    with contextlib.suppress(psutil.Error):  # it has ended
        process = psutil.Process(int(found[1]))
        # A younger process has the number of one that has ended.
        if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= changed + _NOTED_S:
            return line
    return None
