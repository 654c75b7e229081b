"""The fleet as an operator meets it: addresses, hanging workers, memory."""

from __future__ import annotations

import os
import signal
import time

import pytest

from orchestration.cluster.connection import resolve_resources, start_ray
from orchestration.cluster.failures import WorkerLost
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.placement import check_fits
from orchestration.config.compose import load_config
from orchestration.training.mesh import mesh_shape

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:10001"])
def test_an_address_that_cannot_work_is_refused_at_once(address):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"cluster\.address = "):
        start_ray(address)
    assert time.monotonic() - start < 10


@pytest.mark.drill
def test_a_worker_that_hangs_is_found_within_the_limit(local_ray):
    """SIGSTOP: the process lives and holds its place, but does not answer."""
    config = load_config(
        ["dataset.image_size=16", "engine.threads=1", "cluster.cpus_per_worker=0.1", "cluster.heartbeat_timeout_s=60"]
    )
    fleet = Fleet(config, mesh_shape(3, 1))
    try:
        fleet.start()
        fleet.build("train")
        hanging = config.cluster.model_copy(update={"heartbeat_timeout_s": 3.0})
        fleet.config = config.model_copy(update={"cluster": hanging})
        assert fleet.call("train", 1)
        os.kill(fleet.hosts[0]["pid"], signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(WorkerLost, match="has not answered for 3 s"):
            fleet.call("train", 2)
        assert time.monotonic() - start < 12
    finally:
        os.kill(fleet.hosts[0]["pid"], signal.SIGKILL)
        fleet.close()


def test_shares_of_cpus_are_found_for_any_number_of_workers(local_ray):
    """Three workers fit two cores: shares are fractions, and all of them together fit."""
    import ray

    total = ray.cluster_resources()["CPU"]
    for workers in (1, 2, 3, 7, 24):
        cpus, threads = resolve_resources(load_config([]).cluster, load_config([]).engine, workers)
        assert cpus * workers <= total + 1e-9
        assert threads >= 1
        check_fits(workers, {"CPU": cpus}, {"here": {"CPU": total}})


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1234: Connection reset by peer",
        "NCCL communicator was aborted on rank 1",
    ],
)
def test_a_broken_exchange_is_a_lost_worker(text, local_ray):
    """In the backends' words; nothing else says that a partner on another node is gone."""
    import ray

    @ray.remote
    def exchange():
        raise RuntimeError(text)

    fleet = Fleet.__new__(Fleet)
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(exchange.remote())
    assert isinstance(fleet._diagnose(caught.value, []), WorkerLost)
