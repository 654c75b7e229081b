"""Nodes that are about to be taken away: by `ray drain-node`, or by a cluster manager that reclaims spot machines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from functools import cached_property

import ray

from orchestration.cluster.ray_internals import draining_nodes

PREEMPTED = 75
"""Exit status of a run that ended for want of nodes, after a checkpoint; EX_TEMPFAIL of sysexits.h: try again later."""
_PERIOD_S = 1.0


class PreemptionNotice(Exception):
    """Nodes under some workers will be gone soon; a checkpoint has been written."""


class Preempted(Exception):
    """The cluster took its nodes back and there is no room left; the newest checkpoint holds what was done."""

    exit_code = PREEMPTED


class LeavingNodes:
    """The nodes that will be gone soon. Ray is asked at most once per second; any thread may look."""

    def __init__(self) -> None:
        self._asked_at = float("-inf")
        self._leaving: frozenset[str] = frozenset()
        self._asking = threading.Lock()

    @cached_property
    def own_node(self) -> str:
        """Id of the node this process is on."""
        return ray.get_runtime_context().get_node_id()

    def among(self, node_ids: Iterable[str]) -> list[str]:
        """Return those of some nodes that will be gone."""
        with self._asking:  # stages side by side ask after every interval, and Ray's head serves the whole cluster
            if time.monotonic() - self._asked_at >= _PERIOD_S:
                self._leaving = frozenset(draining_nodes())
                self._asked_at = time.monotonic()
        return sorted(self._leaving.intersection(node_ids))
