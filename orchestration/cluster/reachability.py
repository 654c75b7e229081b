"""Find nodes that cannot be reached: by the driver, and by the workers of a mesh from each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

_CONNECT_S = 3.0  # a busy machine answers too: its kernel does
_AT_ONCE = 64
_BACKLOG = 4096  # workers of a mesh that may connect to one listener


class Disconnected(ValueError):
    """Two nodes of a mesh do not reach each other, for now."""


Address = tuple[str, int]
"""Host and port."""


def listen(node_address: str, *, gpu: bool) -> socket.socket | None:
    """Listen on a free port of the address that this process exchanges tensors through.

    Returns:
        A socket that nobody needs to accept from, since the kernel answers. None where the address is not this
        machine's, as behind a translation of addresses.
    """
    # The network that exchanges use may be another than Ray's: that one is to be tried.
    chosen = os.environ.get("NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME", "").removeprefix("=")
    addresses = [a.address for a in psutil.net_if_addrs().get(chosen, []) if a.family == socket.AF_INET]
    address = addresses[0] if addresses else node_address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=_BACKLOG)
    except OSError:
        return None


def unreachable_from_here(listeners: Mapping[str, Address]) -> list[str]:
    """Try to connect to all listeners at once, and return the names of those that cannot be reached."""
    if not listeners:
        return []
    with ThreadPoolExecutor(min(len(listeners), _AT_ONCE)) as threads:
        reached = threads.map(_is_reached, listeners.values())
        return [name for name, is_reached in zip(listeners, reached, strict=True) if not is_reached]


def _is_reached(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def disconnected_pair(nodes: Sequence[str], unreachable: Sequence[Sequence[str]]) -> tuple[str, str] | None:
    """Return the first two nodes that do not reach each other, in the order of ranks; None where all do.

    One direction that fails is enough: an exchange needs both.

    Args:
        nodes: of the workers, in the order of ranks.
        unreachable: per worker, the nodes that it could not reach.
    """
    order = list(dict.fromkeys(nodes))
    pairs = [sorted((node, other), key=order.index) for node, others in zip(nodes, unreachable, strict=True)
             for other in others]  # fmt: skip
    if not pairs:
        return None
    one, other = min(pairs, key=lambda pair: [order.index(node) for node in pair])
    return one, other
