"""What all tests share: one thread for torch, and one local Ray whose worker processes serve every test that asks."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The number of threads changes the last bits of a result."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def local_ray():
    """A Ray for the whole session."""
    import ray
    from orchestration.own_ray import start_own_ray

    if not ray.is_initialized():
        start_own_ray()
    yield
    ray.shutdown()
