"""Notices that nodes are about to be taken away: `ray drain-node`, or a cluster manager that reclaims spot machines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from functools import cached_property

import ray
from ray.exceptions import RayError

PREEMPTED = 75
"""Exit status of a run that ended for want of nodes, after a checkpoint; EX_TEMPFAIL of sysexits.h: try again later."""
_PERIOD_S = 1.0


class Drained(Exception):
    """Nodes under some workers will be gone soon; a checkpoint has been written."""


class Preempted(Exception):
    """The cluster took its nodes back and there is no room left; the newest checkpoint holds what was done."""

    exit_code = PREEMPTED


class DrainNotices:
    """Which nodes Ray has been told to drain, asked at most once a second; from any thread."""

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._drained: frozenset[str] = frozenset()
        self._asking = threading.Lock()

    @cached_property
    def own_node(self) -> str:
        """Id of the node this process is on."""
        return ray.get_runtime_context().get_node_id()

    def among(self, node_ids: Iterable[str]) -> list[str]:
        """Those of some nodes that will be gone."""
        with self._asking:
            if time.monotonic() - self._asked >= _PERIOD_S:
                self._drained = frozenset(draining_nodes())
                self._asked = time.monotonic()
        return sorted(self._drained.intersection(node_ids))


def draining_nodes() -> dict[str, int]:
    """Ids of the nodes that Ray has been told to drain, and when: unix milliseconds, 0 for no deadline."""
    from ray._private.state import state

    try:
        return dict(state.get_draining_nodes())
    except (RayError, RuntimeError):  # the head is out of reach for now; a lost node is noticed anyway
        return {}
