"""A fleet speaks of its nodes."""

from __future__ import annotations

import pytest

from orchestration.cluster import fleet as fleet_module
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.placement import NoRoom
from orchestration.config.compose import load_config
from orchestration.training.mesh import MeshShape


def test_more_threads_than_a_cpu_set_leaves_are_named_with_what_to_set():
    words = ["method=ride", "cluster.workers=3", "cluster.cpus_per_worker=4", "engine.threads=4"]
    fleet = Fleet(load_config(words), MeshShape(3, 1))
    fleet.hosts = [{"node": f"10.0.0.{n}", "node_id": str(n), "cpus": cpus} for n, cpus in ((1, 6), (1, 6), (2, 4))]
    (said,) = fleet.crowded_nodes()
    assert said.startswith("node 10.0.0.1: its workers have 8 threads")
    assert "leaves them 6 CPUs" in said and "--num-cpus=6, or set engine.threads=3 " in said


class Group:
    """Places that others hold, for so many looks."""

    def __init__(self, looks):
        self.looks, self.waits = looks, []

    def wait(self, seconds):
        self.waits.append(seconds)
        return len(self.waits) > self.looks


@pytest.fixture
def group(monkeypatch):
    """A group in place of Ray's; `removed` says whether its places were given back."""
    group, removed = Group(2), []
    have = {"CPU": 1.0, "GPU": 0.0, "memory": 2.0 * 2**30}
    monkeypatch.setattr(fleet_module, "placement_group", lambda bundles, strategy: group)
    monkeypatch.setattr(fleet_module, "remove_placement_group", removed.append)
    monkeypatch.setattr(fleet_module.ray, "available_resources", lambda: {"CPU": 0.5, "memory": 2.0**30})
    monkeypatch.setattr(fleet_module.ray, "cluster_resources", lambda: have)
    group.removed = removed
    return group


def waiting_fleet(*words):
    cluster = ["cluster.workers=2", "cluster.cpus_per_worker=0.5", "engine.threads=1", *words]
    return Fleet(load_config(["method=ce", *cluster]), MeshShape(1, 1, 2))


def test_a_wait_for_places_is_looked_at_every_second_and_says_what_is_missing(group):
    looks = []
    found = waiting_fleet("cluster.memory_gib_per_worker=0.25")._new_group(3600, lambda s, say: looks.append(say()))
    assert found is group and not group.removed
    assert group.waits == [1.0] * 3
    wanted = "2 x (0.5 CPUs, 0 GPUs, 0.25 GiB), free are 0.5 CPUs, 0 GPUs, 1 GiB of 1, 0, 2"
    assert looks == [wanted] * 2


def test_a_wait_gives_its_places_back_when_it_is_over_or_ended(group):
    """Else Ray would reserve them for nobody, as soon as there is room."""

    def stop(waited_s, awaited):
        raise KeyboardInterrupt

    fleet = waiting_fleet()
    with pytest.raises(KeyboardInterrupt):
        fleet._new_group(3600, stop)
    with pytest.raises(NoRoom, match=r"wanted 2 x .* free are .* after 1e-09 s of waiting; .*placement_timeout_s"):
        fleet._new_group(1e-9, None)
    assert group.removed == [group, group]
