"""Workers that stay from run to run: the fleet of a run that ended well serves the next run that wants one like it.

Only a process that trains several runs keeps fleets, inside `kept_warm`. What a fleet has computed does not reach the
next run: workers leave their mesh and drop model and optimiser; what stays is libraries, the process, and data that is
opened with the same config. A fleet that saw a failure is ended. One is kept at a time: its places are not free for
others meanwhile, which is why a study has as many lanes as places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

_LEAVE_S = 20.0  # how long workers may take to leave their mesh; else they are ended
_GROWTH_MIB = 1024.0  # of a worker since it was started: what libraries keep between runs must not grow for ever


@dataclass
class Kept:
    """Workers in their places.

    Attributes:
        key: what a run must want to get them.
        workers, group, seats: as in `Fleet`.
        first_mib: memory of each worker after its first run.
    """

    key: tuple[Any, ...]
    workers: list[Any]
    group: PlacementGroup
    seats: list[int]
    first_mib: list[float]

    def end(self) -> None:
        """End the workers and give their places back."""
        for worker in self.workers:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(worker)
        with contextlib.suppress(RayError, ValueError):
            remove_placement_group(self.group)


class _Store:
    keeping = False
    kept: Kept | None = None


@contextlib.contextmanager
def kept_warm() -> Iterator[None]:
    """Keep the fleet of each run for the next one, until the context ends."""
    _Store.keeping = True
    try:
        yield
    finally:
        _Store.keeping = False
        end_kept()


def end_kept() -> None:
    """End the workers that are kept, if there are any."""
    kept, _Store.kept = _Store.kept, None
    if kept is not None:
        kept.end()


def take_kept(key: tuple[Any, ...]) -> Kept | None:
    """Return the workers that are kept if they fit, else end them: their places are needed."""
    kept = _Store.kept
    if kept is None:
        return None
    if kept.key != key or not _answer(kept.workers):
        end_kept()
        return None
    _Store.kept = None
    return kept


def _answer(workers: list[Any]) -> bool:
    try:
        ray.get([worker.heartbeat.remote() for worker in workers], timeout=5.0)
    except RayError:
        return False
    return True


def keep(key: tuple[Any, ...], workers: list[Any], group: PlacementGroup, seats: list[int], first: list[float]) -> bool:
    """Keep workers for the next run, if this process keeps any.

    Args:
        key: what a run must want to get them.
        workers: in the order of ranks; none of them has failed.
        group, seats: their places.
        first: their memory after their first run, MiB; empty for new ones.

    Returns:
        Whether they are kept; else the caller ends them.
    """
    if not _Store.keeping or _Store.kept is not None or not workers:
        return False
    try:
        held: list[float] = ray.get([worker.renew.remote() for worker in workers], timeout=_LEAVE_S)
    except RayError:
        return False
    first = first or held
    if any(now - before > _GROWTH_MIB for now, before in zip(held, first, strict=True)):
        return False
    _Store.kept = Kept(key, workers, group, seats, first)
    return True
