"""Shared by all tests: one thread for torch, and one local Ray whose workers serve any test that needs them."""

from __future__ import annotations

import os
import threading
from collections import Counter

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed takes CUDA wherever torch was built with it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a process whole files, in the order in which they are collected, so that fixtures of a file are made once.

    Test by test, 12,000 messages and a search through all earlier ones for each would cost ten seconds, too.
    """
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            return super()._split_scope(nodeid).split("::")[0]

    if config.getoption("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False  # else by the number of tests alone, and those on Ray would come late
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """Keep tests that share the local Ray in one process when several processes run tests, and let it begin with them.

    Files of long tests are next, then those with most tests, so that the processes end together.
    """
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items if not item.get_closest_marker("drill"))
        items.sort(
            key=lambda item: (
                item.get_closest_marker("ray") is None,
                "e2e" not in item.path.parts,
                -counts[item.path],
                item.path,
            )
        )


def pytest_collection_finish(session):
    """Refuse to run where groups count for nothing: each process would have a Ray and every shared fixture."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if session.config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("pytest-xdist cannot group tests with this pytest (9.2 is too new for 3.8); make setup")


@pytest.fixture(autouse=True)
def one_thread():
    """Fix the number of threads: it changes the last bits of a result."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def local_ray():
    """Start one Ray for the whole session."""
    import ray

    from orchestration.cluster.local_ray import start_local_ray

    if not ray.is_initialized():
        start_local_ray()
    yield
    ray.shutdown()


class WarmPool:
    """Worker actors that outlive a test. A fleet made under `lend` takes its workers from here."""

    def __init__(self) -> None:
        self.actors: list = []
        self._lent: list = []
        self._changing = threading.Lock()  # stages side by side start their fleets from threads

    def take(self, count: int, engine: str) -> list:
        """Return `count` free workers, one thread each; start new ones if too few are free."""
        import ray

        from orchestration.cluster.worker import Worker

        with self._changing:
            free = [actor for actor in self.actors if actor not in self._lent]
            while len(free) < count:
                free.append(Worker.options(num_cpus=0, max_restarts=0).remote(gpu=False, threads=1))
                self.actors.append(free[-1])
            workers = free[:count]
            self._lent += workers
        ray.get([worker.load_libraries.remote(engine) for worker in workers])
        return workers

    def give_back(self, workers: list) -> None:
        """Free workers for the next test, and drop those that died."""
        import ray

        for worker in workers:
            try:
                ray.get(worker.leave.remote(), timeout=30)
            except ray.exceptions.RayError:
                ray.kill(worker)
                self.actors.remove(worker)
            self._lent.remove(worker)


@pytest.fixture(scope="session")
def warm_pool(local_ray):
    """Make one pool of workers for the session."""
    return WarmPool()


def lend(pool, monkeypatch):
    """Make fleets take workers from the pool instead of starting new ones in a placement group."""
    from orchestration.cluster.fleet import Fleet

    def create(fleet, ranks, *, spare=False):
        return pool.take(len(ranks), fleet.engine)

    def close(fleet):
        pool.give_back(fleet.workers)
        fleet.workers = []

    # The pool has no placement group.
    monkeypatch.setattr(Fleet, "reserve", lambda fleet, *_: fleet.check_room())
    monkeypatch.setattr(Fleet, "unreachable_nodes", lambda fleet: [])
    monkeypatch.setattr(Fleet, "_create", create)
    monkeypatch.setattr(Fleet, "close", close)


@pytest.fixture
def warm(warm_pool, monkeypatch):
    """Let fleets take their workers from the pool, see `lend`."""
    lend(warm_pool, monkeypatch)
    return warm_pool
