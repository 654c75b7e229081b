"""Warm processes that fill the place of a dead worker in seconds. One that fails is reported within seconds, too.

A spare answers to nobody until it is needed. So its promise to be warm, and later an open question, are looked at
beside the calls to the workers: Ray answers both with an error as soon as the process has died.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from orchestration.cluster.failures import failure_of, refusal

_LOOK_S = 2.0  # between two looks


class Spares:
    """The spare processes of a fleet.

    Args:
        report: takes one line for each that is lost.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._warm: list[tuple[Any, Any]] = []  # a process, and the promise of what `warm_up` returns
        self._asked: dict[Any, Any] = {}  # an open question by process
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self._warm)

    def add(self, process: Any, promise: Any) -> None:
        """Take a process that has begun to warm up."""
        self._warm.append((process, promise))

    def look(self) -> None:
        """Report those that could not warm up or have died since, and do without them; return at once."""
        if not self._warm or time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        for spare in list(self._warm):
            process, promise = spare
            ref = self._asked.get(process, promise)
            if not ray.wait([ref], timeout=0)[0]:
                continue
            try:
                ray.get(ref)
            except RayError as error:
                self._lose(spare, error)
            else:
                self._asked[process] = process.heartbeat.remote()

    def _lose(self, spare: tuple[Any, Any], error: RayError) -> None:
        self._drop(spare)
        cause = refusal(error) if isinstance(error, RayTaskError) else failure_of(error)
        self._report(
            f"a spare worker is lost ({cause or str(error).strip().splitlines()[-1]}); {len(self)} left "
            f"(cluster.standby); training goes on, and the next stage starts new ones"
        )

    def _drop(self, spare: tuple[Any, Any]) -> None:
        self._warm.remove(spare)
        self._asked.pop(spare[0], None)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(spare[0])

    def take(self, nodes: Sequence[str], again: Callable[[Any], Any]) -> list[Any]:
        """Take a warm process for each of some nodes, as far as there are any; on that node if possible.

        Args:
            nodes: ids.
            again: makes a promise of those that stay, as `add` takes it.
        """
        ready = []
        for spare in list(self._warm):
            process, promise = spare
            if not ray.wait([promise], timeout=0)[0]:  # one that is still loading is not faster than a new process
                continue
            try:
                ray.get(process.heartbeat.remote(), timeout=1.0)
                ready.append((ray.get(promise)["node_id"], process))
                self._warm.remove(spare)
                self._asked.pop(process, None)
            except RayError as error:
                self._lose(spare, error)

        chosen = []
        for node in nodes[: len(ready)]:
            ready.sort(key=lambda found, node=node: found[0] != node)  # type: ignore[misc]
            chosen.append(ready.pop(0)[1])
        for _, unused in ready:
            self.add(unused, again(unused))
        return chosen

    def close(self) -> None:
        """End all of them."""
        for spare in list(self._warm):
            self._drop(spare)
