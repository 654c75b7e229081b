"""Who answers whom: raylets the driver, and the nodes of a mesh one another."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

_KNOCK_S = 3.0  # a busy machine answers too: its kernel does
_AT_ONCE = 64
_KNOCKS = 4096  # workers of a mesh that may knock at one door

Place = tuple[str, int]
"""Address and port."""


def answering(places: Sequence[Place]) -> list[bool]:
    """Whether somebody listens at each place; all are asked at once."""
    if not places:
        return []
    with ThreadPoolExecutor(min(len(places), _AT_ONCE)) as threads:
        return list(threads.map(_answers, places))


def _answers(place: Place) -> bool:
    try:
        socket.create_connection(place, timeout=_KNOCK_S).close()
    except OSError:
        return False
    return True


def open_door(node_address: str, *, gpu: bool) -> socket.socket | None:
    """Listen on a free port of the address that this process exchanges tensors through; None where it has another, as
    behind a translation of addresses."""
    chosen = os.environ.get("NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME", "")
    addresses = [a.address for a in psutil.net_if_addrs().get(chosen, []) if a.family == socket.AF_INET]
    address = addresses[0] if addresses else node_address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=_KNOCKS)  # nobody opens; the kernel answers
    except OSError:
        return None


def cut_off(nodes: Sequence[str], silent: Sequence[Sequence[str]]) -> tuple[str, str] | None:
    """The two nodes whose cut is to be told, the one to do without last; None where all reach all.

    The latter is the node with most cuts, of equals the last.

    Args:
        nodes: of the workers, in the order of ranks.
        silent: the nodes that did not answer a worker, likewise.
    """
    cuts = {frozenset((node, other)) for node, others in zip(nodes, silent, strict=True) for other in others}
    if not cuts:
        return None
    count = Counter(node for cut in cuts for node in cut)
    worst = max(count, key=lambda node: (count[node], nodes.index(node)))
    other = min((node for cut in cuts if worst in cut for node in cut - {worst}), key=nodes.index)
    return other, worst
