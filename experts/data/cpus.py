"""The CPUs that this process may use: fewer than the machine has, in a container, a batch job or under taskset.

A CPU set names them (`sched_getaffinity`). A quota is a share of time that a control group has over all CPUs: threads
beyond it run, and all of them are then stopped for the rest of each period. Linux tells in files; elsewhere there are
neither.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus() -> int:
    """Return the number of CPUs that this process may keep busy, at least 1. Of a quota the whole ones count."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(quota() + 1e-6) if quota() < allowed else allowed))


def quota(process: Path = Path("/proc/self")) -> float:
    """Return how many CPUs the quotas of this process's control groups amount to, infinity without one.

    Args:
        process: folder of the process in proc.
    """
    groups, mounts = _lines(process / "cgroup"), [_Mount(line) for line in _lines(process / "mountinfo")]
    found = [float("inf")]
    for line in (line for line in groups if line.count(":") >= 2):
        _, controllers, path = line.split(":", 2)
        for mount in mounts:
            if (not controllers and mount.kind == "cgroup2") or (
                "cpu" in controllers.split(",") and mount.kind == "cgroup" and "cpu" in mount.options
            ):
                found += mount.quotas(path)
    return min(found)


class _Mount:
    """A line of mountinfo: `id parent device root place options ... - kind source options`."""

    def __init__(self, line: str) -> None:
        before, _, after = line.partition(" - ")
        self._root, self._place = before.split()[3:5]
        self.kind, _, options = (*after.split(), "", "", "")[:3]
        self.options = options.split(",")

    def quotas(self, path: str) -> Iterator[float]:
        """Yield the quota of a group and of each one above it that can be seen from here."""
        place = Path(self._place)
        inside = Path(path)
        with contextlib.suppress(ValueError):  # a container may see its own group as the root
            inside = inside.relative_to(self._root)
        folder = place / str(inside).lstrip("/")
        while True:
            yield from _quota_of(folder)
            if folder == place or place not in folder.parents:
                return
            folder = folder.parent


def _quota_of(folder: Path) -> Iterator[float]:
    texts = _lines(folder / "cpu.max")
    if not texts:
        quotas, periods = (_lines(folder / f"cpu.cfs_{what}_us") for what in ("quota", "period"))
        texts = [f"{quota} {period}" for quota, period in zip(quotas, periods, strict=False)]  # one may be hidden
    for text in texts[:1]:
        with contextlib.suppress(ValueError):  # "max" and -1 are no limit
            share, period = map(int, text.split())
            if share > 0 and period > 0:
                yield share / period


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
