"""Ray of this machine, started while libraries load."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator

import ray

from orchestration.cluster.local_ray import start_local_ray


@contextlib.contextmanager
def early_ray(words: list[str], library: str = "orchestration.commands.train") -> Iterator[None]:
    """Run our own Ray when nothing names a cluster, started while another thread loads a library: torch with it.

    Half of the time from command to first step is spent waiting for Ray's processes and for libraries, seconds each.
    Ray starts in this thread, because its processes end with the thread that started them.
    """
    named = os.environ.get("RAY_ADDRESS") or any(w.startswith(("cluster.address=", "cluster=")) for w in words)
    if named or ray.is_initialized():
        yield
        return
    loading = threading.Thread(target=importlib.import_module, args=(library,), daemon=True)
    loading.start()
    start_local_ray()
    loading.join()
    try:
        yield
    finally:
        ray.shutdown()
