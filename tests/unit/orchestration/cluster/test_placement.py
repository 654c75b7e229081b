"""Places on nodes, and where Ray packs workers."""

from __future__ import annotations

import pytest

from orchestration.cluster.placement import NoRoom, check_fits, largest_share, pack


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
