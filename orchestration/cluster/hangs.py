"""Workers that hang: how they are found, and what all of their mesh were doing, kept before they are ended."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from orchestration.cluster.failures import WorkerLost

_ANSWER_S = 3.0  # a worker that can answer does so from a thread of its own
_SILENT = (
    f"no answer in {_ANSWER_S:g} s: the process is stopped or dead, its node is out of reach, or a library holds "
    f"Python's lock; while the process is there, `py-spy dump --native --pid <pid>` on its node tells\n"
)


class Watch:
    """Finds workers that hang: asked beside their work, they say when they last finished something."""

    def __init__(self, workers: list[Any], limit_s: float) -> None:
        self._workers, self._limit_s = workers, limit_s
        self._answered = dict.fromkeys(range(len(workers)), time.monotonic())
        self._asked: dict[Any, int] = {}  # a busy node may answer at a later look

    def look(self, ranks: Iterable[int]) -> None:
        """Ask those that are at work.

        Raises:
            WorkerLost: one has not finished anything, or not answered, for the limit.
        """
        at_work = set(ranks)
        for rank in at_work.difference(self._asked.values()):
            self._asked[self._workers[rank].heartbeat.remote()] = rank
        refs = list(self._asked)
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=min(1.0, self._limit_s))
        for ref in done:
            rank = self._asked.pop(ref)
            with contextlib.suppress(RayError, GetTimeoutError):
                step, idle_s = ray.get(ref)
                self._answered[rank] = time.monotonic()
                if idle_s > self._limit_s and rank in at_work:
                    raise WorkerLost(
                        f"worker {rank} has finished nothing for {idle_s:.0f} s, after step {step}", "hang"
                    )
        for rank, at in sorted(self._answered.items(), key=lambda item: item[1]):
            if rank in at_work and time.monotonic() - at > self._limit_s:
                raise WorkerLost(f"worker {rank} has not answered for {self._limit_s:g} s", "hang")


def own_stacks() -> str:
    """Stacks of all Python threads of this process, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def keep_stacks(workers: Sequence[Any], hosts: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write what each worker is doing to a file of its own.

    Args:
        workers: actors with a method `stacks` that answers beside their work, in the order of ranks.
        hosts: what each said of itself; may be shorter.
        folder: for the files, `<time>-worker<rank>.txt`.

    Returns:
        Which files, and who did not answer, in words.
    """
    refs = [worker.stacks.remote() for worker in workers]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_S)
    stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    silent = []
    for rank, ref in enumerate(refs):
        host = hosts[rank] if rank < len(hosts) else {"pid": "unknown", "node": "unknown"}
        text = None
        if ref in done:
            with contextlib.suppress(RayError):
                text = ray.get(ref)
        if text is None:
            silent.append(f"worker {rank}")
        where = f"worker {rank}, pid {host['pid']} on node {host['node']}"
        try:
            folder.mkdir(exist_ok=True)
            (folder / f"{stamp}-worker{rank}.txt").write_text(f"{where}\n\n{text or _SILENT}")
        except OSError as error:
            return f"stacks could not be kept in {folder}: {error}"
    said = f"stacks kept in {folder}/{stamp}-worker*.txt"
    return f"{said}; no answer from {', '.join(silent)}" if silent else said
