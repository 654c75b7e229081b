"""How experts lie on workers, and which numbers are refused."""

from __future__ import annotations

import pytest

from orchestration.training.mesh import MeshShape, mesh_shape

EVERY = range(1, 9)


@pytest.mark.parametrize("experts", EVERY)
def test_one_worker_holds_all_experts(experts):
    assert mesh_shape(experts, 1) == MeshShape(experts, experts, 1)


@pytest.mark.parametrize("experts", EVERY)
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_multiple_of_the_experts_holds_one_each(experts, replicas):
    shape = mesh_shape(experts, experts * replicas)
    assert (shape.slots, shape.replicas, shape.experts_per_worker) == (experts, replicas, 1)


@pytest.mark.parametrize("experts", EVERY)
def test_every_divisor_is_a_shape_and_nothing_else(experts):
    for each in range(1, 10):
        if experts % each:
            divisors = [str(d) for d in EVERY if experts % d == 0]
            with pytest.raises(ValueError, match=f"num_experts = {experts}: use {' or '.join(divisors)}$"):
                mesh_shape(experts, experts, each)
        else:
            slots = experts // each
            assert mesh_shape(experts, 2 * slots, each) == MeshShape(experts, each, 2)


@pytest.mark.parametrize("experts", EVERY)
@pytest.mark.parametrize("workers", range(2, 17))
def test_counts_that_do_not_fit_are_refused_with_those_that_do(experts, workers):
    if workers % experts == 0:
        assert mesh_shape(experts, workers).workers == workers
        return
    with pytest.raises(ValueError, match=f"cluster.workers = {workers} does not fit") as error:
        mesh_shape(experts, workers)
    assert f"use 1 (all experts in one worker) or a multiple of {experts} ({experts}, {2 * experts}," in str(
        error.value
    )
    assert "cluster.experts_per_worker" in str(error.value)


def test_workers_that_do_not_fill_the_slots_are_refused():
    with pytest.raises(ValueError, match=r"needs a multiple of 3 \(3, 6, 9, \.\.\.\)"):
        mesh_shape(6, 4, 2)


def test_every_expert_and_replica_has_exactly_one_place():
    shape = mesh_shape(6, 6, 2)
    places = [shape.position(rank) for rank in range(shape.workers)]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    held = [expert for slot in range(shape.slots) for expert in shape.experts_of(slot)]
    assert held == list(range(6))
