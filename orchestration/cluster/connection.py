"""Connect to a Ray cluster, or start one on this machine, and read what it has."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import ray

from orchestration.cluster.local_ray import start_local_ray
from orchestration.cluster.placement import largest_share
from orchestration.cluster.ray_internals import draining_nodes, own_code_in_workers, rays_of_this_host, token_headers
from orchestration.config.messages import say
from orchestration.config.run_config import ClusterConfig, EngineConfig


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Use the connection to Ray that there is; else connect to `address`, or start a Ray, until the context ends."""
    if ray.is_initialized():  # the caller has connected, and will disconnect
        if address:
            _check_listening(address)
        yield
        return
    start_ray(address)
    try:
        yield
    finally:
        ray.shutdown()


def start_ray(address: str | None) -> None:
    """Connect to a Ray cluster, or start one here when neither `address` nor RAY_ADDRESS names one.

    Raises:
        ValueError: there is no cluster at the address.
    """
    named = address or os.environ.get("RAY_ADDRESS")
    if not named:
        start_local_ray()
        return
    named = _one_of_this_host() if named == "auto" else named
    _check_listening(named)
    try:
        with own_code_in_workers():
            ray.init(address=named, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"cluster.address = {named}: no Ray cluster answers ({str(error).splitlines()[0]}); "
            f"start one with `ray start --head`, correct the address, or unset it to run on this machine alone"
        ) from error


def _one_of_this_host() -> str:
    """Return the address that 'auto' means here: of the only Ray, or of the one that `ray start` started last.

    Others may be those of other users, or of other runs that named no cluster and end with them.

    Raises:
        ValueError: there are several, and none of them is of `ray start`.
    """
    running, started = rays_of_this_host()
    if len(running) < 2:
        return next(iter(running), "auto")
    ports = {address.rpartition(":")[2] for address in running}
    if started is not None and started.rpartition(":")[2] in ports:
        say(
            f"cluster.address = auto: {len(running)} Rays run on this host; taken is {started}, of the last `ray start`"
        )
        return started
    raise ValueError(
        f"cluster.address = auto: {len(running)} Rays run on this host ({', '.join(sorted(running))}), and `ray start` "
        f"started none of them; needed one; set cluster.address or RAY_ADDRESS to it"
    )


def _check_listening(address: str) -> None:
    """Refuse an address where nobody listens. Ray itself would try for minutes and then end the process.

    Raises:
        ValueError: nobody listens, or it is the address of a Ray Client.
    """
    if address.startswith("ray://"):
        raise ValueError(
            f"cluster.address = {address}: a run must be driven from inside the cluster; needed auto or host:port; "
            f"use `ray job submit --working-dir . -- python -m orchestration train ...`"
        )
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"cluster.address = {address}: the address of a dashboard, for `ray job submit` (RAY_ADDRESS may hold it); "
            f"needed auto or host:port of a Ray head; set cluster.address or RAY_ADDRESS, or unset both to run on this "
            f"host alone"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # 'auto' and 'local'
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cluster.address = {address}: nobody listens there ({error}); needed the address of a running Ray head; "
            f"start one with `ray start --head`, correct the address or RAY_ADDRESS, or unset it to run on this host "
            f"alone"
        ) from error
    _check_token(address)


def _check_token(address: str) -> None:
    """Refuse a token that the cluster refuses. Ray itself would say only that it could not connect.

    Raises:
        ValueError: the cluster asks for a token, and ours is missing or differs.
    """
    import grpc

    # Ray's cheapest call to the head, by its name, with an empty message: all that counts is whether it is let in.
    headers = token_headers()
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(
                b"", timeout=10, metadata=[(name.lower(), value) for name, value in headers.items()]
            )
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                return  # not a matter of tokens; connecting will tell
            found = "another token than the cluster's" if headers else "no token"
            raise ValueError(
                f"cluster.address = {address}: the cluster refuses us: it was started with token authentication and "
                f"found {found}; needed the cluster's own; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<its file>"
            ) from error


def resolve_resources(config: ClusterConfig, engine: EngineConfig, workers: int) -> tuple[float, int]:
    """Return the CPUs and threads of a worker, where the config leaves them open.

    Returns:
        cpus_per_worker, an equal share of the cluster's CPUs, whole ones where there is more than one; and threads.
    """
    cpus = config.cpus_per_worker
    if cpus is None:
        cpus = largest_share(workers, [node.get("CPU", 0.0) for node in node_resources().values()])
    return cpus, engine.threads or max(1, int(cpus))


def node_resources() -> dict[str, dict[str, float]]:
    """Return all resources of every living node that is not being drained, by its address."""
    leaving = draining_nodes()
    return {
        f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": dict(node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    }


def own_address() -> str:
    """Return the address of the Ray that this process is connected to, for other processes of this host."""
    return str(ray.get_runtime_context().gcs_address)
