"""Places on nodes, and where Ray packs workers."""

from __future__ import annotations

import pytest

from orchestration.cluster.placement import (
    NoRoom,
    check_fits,
    largest_share,
    pack,
    placement_wait_s,
    restart_wait_s,
    seats,
    shape_of,
    shapes_of,
)
from orchestration.config.compose import load_config
from orchestration.training.mesh import MeshShape


@pytest.mark.parametrize(
    ("workers", "nodes", "share"),
    [(3, [1, 1], 0.5), (2, [5, 3], 3), (2, [3, 1], 1), (1, [64], 8), (3, [2], 0.66), (6, [2, 2], 0.66)],
)
def test_the_largest_share_that_fits_uneven_nodes_is_found(workers, nodes, share):
    assert largest_share(workers, nodes) == share
    check_fits(workers, {"CPU": share}, {str(i): {"CPU": float(n)} for i, n in enumerate(nodes)})


def test_what_does_not_fit_is_counted_by_node():
    """Two nodes of 4 CPUs have two places for 3 CPUs, not 8 // 3."""
    nodes = {"a": {"CPU": 4.0}, "b": {"CPU": 4.0, "GPU": 1.0}}
    check_fits(2, {"CPU": 3.0}, nodes)
    with pytest.raises(NoRoom, match="has places for 2"):
        check_fits(3, {"CPU": 2.5}, nodes)
    with pytest.raises(NoRoom, match="b: 4 CPUs, 1 GPUs"):
        check_fits(2, {"CPU": 1.0, "GPU": 1.0}, nodes)


def test_workers_are_packed_on_few_nodes_the_emptiest_first():
    """Left after one worker of 1 CPU: 3 of 4, 1 of 2, 7 of 8. Ray's scheduler takes the largest share first."""
    nodes = {"a": {"CPU": 4.0}, "b": {"CPU": 2.0}, "c": {"CPU": 8.0}}
    assert pack(3, {"CPU": 1.0}, nodes).nodes == ("c",)
    over = pack(10, {"CPU": 1.0}, nodes)
    assert over.nodes == ("c", "a") and over.on("a") == [8, 9] and over.on("b") == []
    assert pack(15, {"CPU": 1.0}, nodes) is None
    assert pack(14, {"CPU": 1.0}, nodes).nodes == ("c", "a", "b")


def test_packing_counts_gpus_memory_and_fractions():
    nodes = {"a": {"CPU": 4.0, "memory": 2e9}, "b": {"CPU": 4.0, "GPU": 2.0, "memory": 9e9}}
    assert pack(2, {"CPU": 1.0, "GPU": 1.0}, nodes).nodes == ("b",)
    assert pack(3, {"CPU": 1.0, "GPU": 1.0}, nodes) is None
    assert pack(3, {"CPU": 1.0, "memory": 3e9}, nodes).nodes == ("b",)
    assert pack(3, {"CPU": 0.66}, {"one": {"CPU": 2.0}}).node_of == (0, 0, 0)


def nodes_by_rank(node_of_bundle, replicas):
    order = seats(node_of_bundle, replicas)
    assert sorted(order) == list(range(len(node_of_bundle))), "every place is taken once"
    return "".join(node_of_bundle[bundle] for bundle in order)


@pytest.mark.parametrize(
    ("reserved", "replicas", "by_rank"),
    [
        ("abab", 1, "aabb"),  # neighbours in a ring share nodes
        ("ababab", 3, "aaabbb"),
        ("abcabc", 2, "aabbcc"),
        ("aaabbc", 2, "aabbac"),  # by node alone, two slots of three would lie on two nodes
        ("bbaaaa", 4, "aaaabb"),
        ("abbbba", 6, "bbbbaa"),
        ("aaaa", 2, "aaaa"),
    ],
)
def test_the_replicas_of_a_slot_sit_on_one_node_as_far_as_possible(reserved, replicas, by_rank):
    """Nodes of the places in Ray's order, workers per slot, and the nodes of the ranks then."""
    assert nodes_by_rank(reserved, replicas) == by_rank


def test_a_plan_draws_ranks_where_a_fleet_seats_them():
    nodes = {"a": {"CPU": 2.0}, "b": {"CPU": 3.0}, "c": {"CPU": 1.0}}
    packed = pack(6, {"CPU": 1.0}, nodes)
    assert packed.on("b") == [0, 1, 2] and packed.on("a") == [3, 4]
    seated = packed.seated(2)
    assert (seated.on("b"), seated.on("a"), seated.on("c")) == ([0, 1, 4], [2, 3], [5])


def test_meshes_fill_their_workers_exactly():
    assert shapes_of(6, 6) == [MeshShape(6, 1), MeshShape(6, 2, 2), MeshShape(6, 3, 3), MeshShape(6, 6, 6)]
    assert shapes_of(3, 2) == [MeshShape(3, 3, 2)]
    assert shapes_of(3, 1) == [MeshShape(3, 3)]


def test_auto_stands_for_a_number_that_fits_until_it_is_decided():
    def shape(*words):
        return shape_of(3, load_config(["method=ride", *words]).cluster)

    assert shape("cluster.experts_per_worker=auto") == MeshShape(3, 3)
    assert shape("cluster.experts_per_worker=auto", "cluster.workers=2") == MeshShape(3, 3, 2)
    assert shape("cluster.experts_per_worker=auto", "cluster.workers=6") == shape("cluster.workers=6")


def test_a_submitted_job_waits_for_a_day_unless_a_number_is_given():
    auto, given = load_config([]).cluster, load_config(["cluster.placement_timeout_s=30"]).cluster
    assert [placement_wait_s(auto), placement_wait_s(auto, job=True)] == [8.0, 86400.0]
    assert [placement_wait_s(given), placement_wait_s(given, job=True)] == [30, 30]
    assert [restart_wait_s(auto), restart_wait_s(given)] == [80.0, 300]
    with pytest.raises(ValueError, match="needed a number of seconds above 0, or auto"):
        load_config(["cluster.placement_timeout_s=0"])
