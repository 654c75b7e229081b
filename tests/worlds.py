"""Processes that form one torch world after another, without Ray, for tests that look into many workers' steps.

They are forked from a process that has loaded the libraries already, so all of them together take some seconds.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

LIMIT_S = 120.0


class Worlds:
    """Some processes. `run` has the first of them work as one mesh."""

    def __init__(self, size: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.worlds_libraries"])
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, config: Any, stage: str, teachers: dict[str, str], look: Callable[[Any], Any]) -> list[Any]:
        """Build a stage's trainer in every worker of the config's mesh, and return what `look` returns for each.

        Raises:
            RuntimeError: a worker failed; has its traceback.
        """
        workers = self._pipes[: config.cluster.workers]
        workers[0].send(("open", len(workers)))
        port = _answer(workers[0])
        for pipe in workers:
            pipe.send(("run", port, config, stage, teachers, look))
        return [_answer(pipe) for pipe in workers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(("end",))
            pipe.close()
        for process in self._processes:
            process.join(timeout=30)


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(LIMIT_S):
        raise TimeoutError(f"a worker did not answer in {LIMIT_S:g} s")
    good, value = pipe.recv()
    if not good:
        raise RuntimeError(value)
    return value


def _serve(rank: int, pipe: Connection) -> None:
    import torch

    from orchestration.training.world import Rendezvous, leave_world

    torch.set_num_threads(1)
    meeting = None
    while True:
        word, *args = pipe.recv()
        if word == "end":
            return
        try:
            if word == "open":
                meeting = Rendezvous("127.0.0.1", args[0], host_here=True, timeout_s=LIMIT_S)
                pipe.send((True, meeting.port))
                continue
            port, config, stage, teachers, look = args
            workers = config.cluster.workers
            if rank:
                meeting = Rendezvous("127.0.0.1", workers, port=port, host_here=False, timeout_s=LIMIT_S)
            meeting.join(rank, workers, gpu=False, timeout_s=LIMIT_S)
            with _trainer(rank, config, stage, teachers) as trainer:
                answer = look(trainer)
            pipe.send((True, answer))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if word == "run":
                leave_world()
                meeting = None


@contextlib.contextmanager
def _trainer(rank: int, config: Any, stage: str, teachers: dict[str, str]) -> Iterator[Any]:
    from orchestration.training.mesh import Mesh, mesh_shape
    from orchestration.training.trainer import StageTrainer

    cluster = config.cluster
    mesh = Mesh(mesh_shape(config.method.num_experts, cluster.workers, cluster.experts_per_worker), rank)
    trainer = StageTrainer(config, stage, _dataset(config.dataset), mesh, teachers)
    try:
        yield trainer
    finally:
        trainer.close()


@cache
def _dataset(config: Any) -> Any:
    from experts.data.dataset import open_dataset

    return open_dataset(config)
