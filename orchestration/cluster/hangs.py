"""Find workers that hang, and write down what all workers of their mesh are doing before they are ended."""

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
_NO_ANSWER = (
    f"no answer in {_ANSWER_S:g} s: the process is stopped or dead, its node is out of reach, or a library holds "
    f"Python's lock; while the process is there, `py-spy dump --native --pid <pid>` on its node tells\n"
)


class Watch:
    """Finds workers that hang. Asked beside their work, workers say when they last finished something."""

    def __init__(self, workers: list[Any], limit_s: float) -> None:
        self._workers, self._limit_s = workers, limit_s
        self._answered = dict.fromkeys(range(len(workers)), time.monotonic())
        self._asked: dict[Any, int] = {}  # ranks by question; a busy node may answer at a later look

    def look(self, ranks: Iterable[int]) -> None:
        """Ask the workers that are at work.

        Args:
            ranks: of those workers.

        Raises:
            WorkerLost: one has not finished anything, or not answered, for the limit.
        """
        at_work = set(ranks)

        # One open question per worker: a node that is out of reach would gather hundreds.
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

        # The longest silence first: that worker is the cause, others may wait for it.
        for rank, at in sorted(self._answered.items(), key=lambda item: item[1]):
            if rank in at_work and time.monotonic() - at > self._limit_s:
                raise WorkerLost(f"worker {rank} has not answered for {self._limit_s:g} s", "hang")


def own_stacks() -> str:
    """Return the stacks of all Python threads of this process, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def write_stacks(workers: Sequence[Any], hosts: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write what each worker is doing to a file of its own.

    Args:
        workers: actors with a method `stacks` that answers beside their work, in the order of ranks.
        hosts: process and node of each; may be shorter.
        folder: for the files, `<time>-worker<rank>.txt`.

    Returns:
        A message with the files' names and the workers that did not answer.
    """
    # All are asked at once, and none is waited for longer than the rest: the worker at fault may never answer.
    refs = [worker.stacks.remote() for worker in workers]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_S)
    stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    unanswered = []
    for rank, ref in enumerate(refs):
        host = hosts[rank] if rank < len(hosts) else {"pid": "unknown", "node": "unknown"}
        text = None
        if ref in done:
            with contextlib.suppress(RayError):
                text = ray.get(ref)
        if text is None:
            unanswered.append(f"worker {rank}")
        where = f"worker {rank}, pid {host['pid']} on node {host['node']}"
        try:
            folder.mkdir(exist_ok=True)
            (folder / f"{stamp}-worker{rank}.txt").write_text(f"{where}\n\n{text or _NO_ANSWER}")
        except OSError as error:
            return f"stacks could not be kept in {folder}: {error}"
    message = f"stacks kept in {folder}/{stamp}-worker*.txt"
    return f"{message}; no answer from {', '.join(unanswered)}" if unanswered else message
