"""How experts lie on workers, and which numbers are refused."""

from __future__ import annotations

import pytest
import torch

from experts.batches import share
from orchestration.training.exchange import NOBODY, Groups
from orchestration.training.mesh import Mesh, MeshShape, mesh_shape

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


class KnownGroup:
    """Replicas whose rows are known; it answers with everyone's, padded as theirs would be."""

    handle = None

    def __init__(self, rows, size, rank):
        self.rows, self.size, self.rank = rows, size, rank

    def all_gather(self, own, what):
        longest = -(-self.rows.shape[1] // self.size)
        assert own.shape[1] == longest and not own.requires_grad
        bounds = [share(self.rows.shape[1], d, self.size) for d in range(self.size)]
        parts = [self.rows[:, first:last] for first, last in bounds]
        padded = [torch.cat([part, part.new_full((2, longest - part.shape[1], 3), 7.0)], dim=1) for part in parts]
        assert torch.equal(own[:, : parts[self.rank].shape[1]], parts[self.rank])
        return padded


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 5, 7])
def test_rows_of_a_whole_batch_come_in_order_with_the_gradient_of_own_rows(images, replicas):
    """Uneven shares, and empty ones: of one image, two of three replicas have none."""
    rows = torch.randn(2, images, 3, generator=torch.Generator().manual_seed(0))
    for replica in range(replicas):
        first, last = share(images, replica, replicas)
        own = rows[:, first:last].clone().requires_grad_()
        data = KnownGroup(rows, replicas, replica) if replicas > 1 else NOBODY.data
        mesh = Mesh(MeshShape(2, 2, replicas), replica, groups=Groups(data, NOBODY.experts, data))
        found = mesh.batch_rows(own, images)
        assert torch.equal(found, rows)
        (found**3).sum().backward()
        torch.testing.assert_close(own.grad, 3 * rows[:, first:last] ** 2)
