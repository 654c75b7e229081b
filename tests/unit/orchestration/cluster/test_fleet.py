"""What a fleet asks of Ray and of its workers, with fakes in the place of both."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestration.cluster import fleet as module
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.placement import NoRoom
from orchestration.config.compose import load_config
from orchestration.training.mesh import MeshShape

WORDS = ["method=ride", "engine.threads=1", "cluster.cpus_per_worker=1", "cluster.workers=3"]


@pytest.fixture
def fleet(monkeypatch):
    """A fleet that has asked nothing of Ray."""

    def refuse(*args, **more):
        raise AssertionError("asked Ray")

    for name in ("node_resources", "placement_group", "placement_group_table", "draining_nodes"):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(module, "ray", None)
    return Fleet(load_config(WORDS), MeshShape(3, 1))


def test_a_fleet_that_was_never_reserved_is_closed_without_ray(fleet):
    fleet.close()
    assert fleet.workers == []


def test_places_that_no_node_has_are_no_room(fleet, monkeypatch):
    monkeypatch.setattr(module, "node_resources", lambda: {"a": {"CPU": 2.0}})
    with pytest.raises(NoRoom, match=r"cluster.workers = 3: wanted 3 x .*places for 2"):
        fleet.reserve()


def test_places_that_others_hold_are_no_room(fleet, monkeypatch):
    removed = []

    class Full:
        def wait(self, seconds):
            return False

    def resources():
        return {"CPU": 3.0}

    monkeypatch.setattr(module, "node_resources", lambda: {"a": {"CPU": 3.0}})
    monkeypatch.setattr(module, "placement_group", lambda bundles, strategy: Full())
    monkeypatch.setattr(module, "remove_placement_group", removed.append)
    ray = SimpleNamespace(available_resources=resources, cluster_resources=resources)
    monkeypatch.setattr(module, "ray", ray)
    with pytest.raises(NoRoom, match=r"wanted 3 x \(1 CPUs, 0 GPUs\), free after .* are 3 CPUs .* of 3 and 0"):
        fleet.reserve()
    assert len(removed) == 1


def test_two_nodes_are_named_by_address_and_one_node_asks_nobody(fleet, monkeypatch):
    asked = []
    answers = {"listen": [("10.0.0.1", 7), ("10.0.0.2", 7), None], "unreachable_from_here": [["id b"], [], []]}

    def call(method, *args):
        asked.append((method, *args))
        return answers[method]

    monkeypatch.setattr(fleet, "call", call)
    fleet.hosts = [{"node_id": f"id {name}", "node": f"10.0.0.{i}"} for i, name in enumerate("abc", 1)]
    assert fleet.disconnected_nodes() == ("10.0.0.1", "10.0.0.2")
    assert asked[1] == ("unreachable_from_here", {"id a": ("10.0.0.1", 7), "id b": ("10.0.0.2", 7)}), "c cannot listen"

    asked.clear()
    fleet.hosts = [{"node_id": "id a", "node": "10.0.0.1"}] * 3
    assert fleet.disconnected_nodes() is None
    assert not asked


def test_raylets_of_one_address_are_asked_apart(fleet, monkeypatch):
    """As on one machine with several nodes; a dead node and one of another run are not asked."""
    nodes = [
        {"NodeID": name, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port, "Alive": alive}
        for name, port, alive in (("a", 1, True), ("b", 2, True), ("dead", 3, False), ("other", 4, True))
    ]

    bundles = {"bundles_to_node_id": {0: "a", 1: "b", 2: "dead"}}
    monkeypatch.setattr(module, "placement_group_table", lambda group: bundles)
    monkeypatch.setattr(module, "ray", SimpleNamespace(nodes=lambda: nodes))
    asked = {}

    def unreachable(listeners):
        asked.update(listeners)
        return ["b"]

    monkeypatch.setattr(module, "unreachable_from_here", unreachable)
    assert fleet.unreachable_nodes() == ["127.0.0.1"]
    assert asked == {"a": ("127.0.0.1", 1), "b": ("127.0.0.1", 2)}


def test_ranks_are_seated_node_by_node(monkeypatch):
    """Six places that Ray filled in turn on two nodes, three slots of two replicas: no slot lies on both nodes."""
    asked = []

    class Ready:
        def wait(self, seconds):
            return True

    class Options:
        @staticmethod
        def options(**options):
            asked.append(options["scheduling_strategy"].placement_group_bundle_index)
            return SimpleNamespace(remote=lambda **more: len(asked))

    table = {"bundles_to_node_id": {0: "a", 1: "b", 2: "a", 3: "b", 4: "a", 5: "a"}}
    monkeypatch.setattr(module, "node_resources", lambda: {"a": {"CPU": 4.0}, "b": {"CPU": 2.0}})
    monkeypatch.setattr(module, "placement_group", lambda bundles, strategy: Ready())
    monkeypatch.setattr(module, "placement_group_table", lambda group: table)
    monkeypatch.setattr(module, "Worker", Options)
    monkeypatch.setattr(
        module, "PlacementGroupSchedulingStrategy",
        lambda group, placement_group_bundle_index: SimpleNamespace(
            placement_group_bundle_index=placement_group_bundle_index
        ),
    )  # fmt: skip
    config = load_config([*WORDS[:-1], "cluster.workers=6"])
    fleet = Fleet(config, MeshShape(3, 1, 2))
    fleet.reserve()
    fleet._create(range(6))
    assert asked == [0, 2, 4, 5, 1, 3]
    assert fleet._create([5]) and asked[-1] == 3, "a worker that is replaced takes its own place again"
