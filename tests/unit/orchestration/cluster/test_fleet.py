"""A fleet speaks of its nodes."""

from __future__ import annotations

from orchestration.cluster.fleet import Fleet
from orchestration.config.compose import load_config
from orchestration.training.mesh import MeshShape


def test_more_threads_than_a_cpu_set_leaves_are_named_with_what_to_set():
    words = ["method=ride", "cluster.workers=3", "cluster.cpus_per_worker=4", "engine.threads=4"]
    fleet = Fleet(load_config(words), MeshShape(3, 1))
    fleet.hosts = [{"node": f"10.0.0.{n}", "node_id": str(n), "cpus": cpus} for n, cpus in ((1, 6), (1, 6), (2, 4))]
    (said,) = fleet.crowded_nodes()
    assert said.startswith("node 10.0.0.1: its workers have 8 threads")
    assert "leaves them 6 CPUs" in said and "--num-cpus=6, or set engine.threads=3 " in said
