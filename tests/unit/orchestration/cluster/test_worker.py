"""The worker's shell: it takes the config as it is, and listens for other workers."""

from __future__ import annotations

import pytest
import ray
import torch
from ray import cloudpickle

from orchestration.cluster.reachability import unreachable_from_here
from orchestration.cluster.worker import Worker
from orchestration.config.compose import load_config
from orchestration.config.identity import identity
from orchestration.config.words import available
from orchestration.training.mesh import MeshShape


@pytest.mark.parametrize("method", [*available("method")[:3], "ride", "lfme"])
def test_a_config_that_was_sent_equals_the_original(method):
    """Ray pickles it, and nothing is dumped or validated again."""
    config = load_config([f"method={method}"])
    sent = cloudpickle.loads(cloudpickle.dumps((config, config.dataset, MeshShape(3, 1))))
    assert sent == (config, config.dataset, MeshShape(3, 1))
    assert identity(sent[0]) == identity(config)
    assert all(type(a) is type(b) for (_, a), (_, b) in zip(sent[0].method, config.method, strict=True))
    with pytest.raises(ValueError, match="frozen"):
        sent[0].seed = 1


def test_the_memory_of_a_gpu_is_told_apart_from_the_processs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**29)
    make = Worker.__ray_metadata__.modified_class
    assert make(gpu=True, threads=1).gpu_peak_memory_gib() == 1.5
    assert make(gpu=False, threads=1).gpu_peak_memory_gib() is None
    assert 0.01 < make(gpu=True, threads=1).peak_memory_gib() != 1.5


def test_every_try_to_reach_a_worker_finds_a_new_listener(monkeypatch):
    """Nobody accepts connections, so a listener that served all tries of a large mesh would be full in the end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    worker = Worker.__ray_metadata__.modified_class(gpu=False, threads=1)
    first, second = worker.listen(), worker.listen()
    assert unreachable_from_here({"first": first, "second": second}) == ["first"]
    worker.leave()
    assert unreachable_from_here({"second": second}) == ["second"]
