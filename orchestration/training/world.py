"""The torch world of a mesh: where its workers meet, over which network, and how a worker leaves it."""

from __future__ import annotations

import math
import os
import socket
from datetime import timedelta

import psutil
import torch.distributed as dist


def use_network_of(address: str) -> None:
    """Make gloo and NCCL use the network interface that has this address of the machine.

    Left alone, gloo takes the address of the host's name, on many machines 127.0.0.1, where no other node answers; NCCL
    takes the first interface that it likes. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in the environment come first,
    whoever set them.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            # To NCCL a name alone stands for every interface that begins with it.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise ValueError(
            f"the workers' meeting point at {address}: no port can be opened there ({error.strerror}); needed an "
            f"address of the node itself; start Ray on it with --node-ip-address=<one of its own>"
        ) from error


class Rendezvous:
    """The meeting point of a torch world. The worker with rank 0 opens it, at one address and on a free port.

    Args:
        address: of the node of rank 0.
        workers: that will join.
        port: where rank 0 has opened it; 0 there, for a free one.
        host_here: whether this is rank 0.
        timeout_s: seconds that a worker may wait for the others.

    Raises:
        ValueError: the address is none of this machine's.
    """

    def __init__(self, address: str, workers: int, *, port: int = 0, host_here: bool, timeout_s: float = 600.0) -> None:
        limit = timedelta(seconds=math.ceil(timeout_s))
        listening = None
        if host_here:
            # By itself the store would listen at every address of the machine. It takes over the file descriptor, so
            # no other process can take the port between the choice of it and the start of the store.
            server = _listen(address, port)
            port, listening = server.getsockname()[1], server.detach()
        self.store = dist.TCPStore(
            address,
            port,
            workers,
            is_master=host_here,
            wait_for_workers=False,  # rank 0 tells the driver the port before anyone else can come
            timeout=limit,
            master_listen_fd=listening,
        )
        self.port: int = port

    def join(self, rank: int, workers: int, *, gpu: bool, timeout_s: float) -> None:
        """Enter the torch world of a mesh.

        Args:
            timeout_s: seconds that an exchange may wait for another worker.
        """
        limit = timedelta(seconds=math.ceil(timeout_s))
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=self.store, rank=rank, world_size=workers, timeout=limit)


def leave_world() -> None:
    """Leave the torch world, if in one, so that this process can serve another mesh."""
    if dist.is_initialized():
        dist.destroy_process_group()
