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

from experts.data.control_groups import HERE, group_folders, lines_of


def usable_cpus() -> int:
    """Return the number of CPUs that this process may keep busy, at least 1. Of a quota the whole ones count."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(quota() + 1e-6) if quota() < allowed else allowed))


def quota(process: Path = HERE) -> float:
    """Return how many CPUs the quotas of this process's control groups amount to, infinity without one.

    Args:
        process: folder of the process in proc.
    """
    return min((share for folder in group_folders("cpu", process) for share in _quota_of(folder)), default=float("inf"))


def _quota_of(folder: Path) -> Iterator[float]:
    texts = lines_of(folder / "cpu.max")
    if not texts:
        quotas, periods = (lines_of(folder / f"cpu.cfs_{what}_us") for what in ("quota", "period"))
        texts = [f"{quota} {period}" for quota, period in zip(quotas, periods, strict=False)]  # one may be hidden
    for text in texts[:1]:
        with contextlib.suppress(ValueError):  # "max" and -1 are no limit
            share, period = map(int, text.split())
            if share > 0 and period > 0:
                yield share / period
