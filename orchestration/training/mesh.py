"""Workers on two axes, expert slots x data replicas, and what they exchange along them (exchange.py).

Rank r holds slot r // replicas and replica r % replicas. Workers of one replica index see the same images and hold
different experts (the expert axis); workers of one slot hold the same experts and see different images (the data axis).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experts.batches import share
from orchestration.training.batchnorm import momenta_of, synchronised
from orchestration.training.exchange import NOBODY, Groups, join_groups

# Shapes: E experts, e experts of one worker, B images of one replica, C classes, D channels.


@dataclass(frozen=True)
class MeshShape:
    """How E experts and their data lie on workers.

    Attributes:
        num_experts: E.
        experts_per_worker: experts in one slot; divides E.
        replicas: workers per slot, each with its share of every batch.
    """

    num_experts: int
    experts_per_worker: int
    replicas: int = 1

    @property
    def slots(self) -> int:
        return self.num_experts // self.experts_per_worker

    @property
    def workers(self) -> int:
        return self.slots * self.replicas

    def position(self, rank: int) -> tuple[int, int]:
        """Return the slot and the replica of a rank."""
        return divmod(rank, self.replicas)

    def experts_of(self, slot: int) -> range:
        """Indices of the experts in a slot."""
        return range(slot * self.experts_per_worker, (slot + 1) * self.experts_per_worker)


def mesh_shape(num_experts: int, workers: int, experts_per_worker: int | None = None) -> MeshShape:
    """Lay E experts on workers, or say which numbers would fit.

    Raises:
        ValueError: the numbers do not fit; names the keys, what was found and the valid counts.
    """
    if experts_per_worker is None:
        if workers == 1:
            return MeshShape(num_experts, num_experts)
        if workers % num_experts == 0:
            return MeshShape(num_experts, 1, workers // num_experts)
        spread = ", ".join(str(num_experts * k) for k in (1, 2, 3))
        raise ValueError(
            f"cluster.workers = {workers} does not fit method.num_experts = {num_experts}: use 1 (all experts in one "
            f"worker) or a multiple of {num_experts} ({spread}, ...: one expert each), "
            f"or set cluster.experts_per_worker to say how many experts share a worker"
        )
    divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
    if experts_per_worker not in divisors:
        raise ValueError(
            f"cluster.experts_per_worker = {experts_per_worker} does not divide method.num_experts = {num_experts}: "
            f"use {_either(divisors)}"
        )
    slots = num_experts // experts_per_worker
    if workers % slots:
        raise ValueError(
            f"cluster.workers = {workers} does not fit method.num_experts = {num_experts} with "
            f"cluster.experts_per_worker = {experts_per_worker}: needs a multiple of {slots} "
            f"({slots}, {2 * slots}, {3 * slots}, ...)"
        )
    return MeshShape(num_experts, experts_per_worker, workers // slots)


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


class Mesh:
    """One worker's place in the mesh and its exchanges. With one worker nothing is exchanged and no world is needed.

    Args:
        shape: the whole mesh.
        rank: of this worker in the torch world.
        device: where tensors live; 'cuda' exchanges with NCCL, 'cpu' with gloo.
        timeout_s: seconds that an exchange may wait for another worker.
        groups: this worker's; by default those of the torch world that this process has joined.

    Attributes:
        groups: whom this worker exchanges with.
    """

    def __init__(
        self,
        shape: MeshShape,
        rank: int = 0,
        device: str = "cpu",
        timeout_s: float = 600.0,
        groups: Groups | None = None,
    ) -> None:
        self.shape = shape
        self.rank = rank
        self.slot, self.replica = shape.position(rank)
        self.device = torch.device(device)
        if groups is None:
            groups = NOBODY if shape.workers == 1 else join_groups(shape.slots, shape.replicas, rank, timeout_s)
        self.groups = groups.with_cuts()

    @property
    def own_experts(self) -> range:
        return self.shape.experts_of(self.slot)

    def gather(self, own_e: Tensor, what: str = "logits") -> Tensor:
        """Gather values of all experts, in their order: own ones [e, ...] keep their graph, the others come detached.

        Args:
            own_e: of this worker's experts.
            what: they are, in words.

        Returns:
            [E, ...] on every worker of this replica index.
        """
        if self.shape.slots == 1:
            return own_e
        # `all_gather` has no gradient, and needs none: each worker differentiates by its own experts' values only.
        slots = self.groups.experts.all_gather(own_e, what)
        return torch.cat([own_e if s == self.slot else other for s, other in enumerate(slots)])

    def batch_rows(self, own_EbX: Tensor, images: int, what: str = "logits of the whole batch") -> Tensor:
        """Gather the rows of a whole batch, in its order: own rows [E, b, ...] keep their graph, others come detached.

        A loss of all rows, evaluated on every replica, then gives each the exact gradient for its own rows, since the
        gradients of replicas are summed. Its value would be counted once per replica.

        Args:
            own_EbX: values for this replica's share of the batch, `share(images, replica, replicas)`; may be empty.
            images: of the whole batch.
            what: they are, in words.

        Returns:
            [E, images, ...] on every worker of this slot.
        """
        replicas = self.shape.replicas
        if replicas == 1:
            return own_EbX
        sizes = [last - first for first, last in (share(images, d, replicas) for d in range(replicas))]
        padded = own_EbX.new_zeros(len(own_EbX), max(sizes), *own_EbX.shape[2:])
        padded[:, : own_EbX.shape[1]] = own_EbX.detach()
        everyone = self.groups.data.all_gather(padded, what)
        rows = [other[:, :size] for other, size in zip(everyone, sizes, strict=True)]
        return torch.cat([*rows[: self.replica], own_EbX, *rows[self.replica + 1 :]], dim=1)

    def statistics_before(self, module: nn.Module) -> list[Tensor]:
        """Copy a module's buffers, for `statistics_in_turn`."""
        return [buffer.detach().clone() for buffer in module.buffers()]

    def statistics_in_turn(self, module: nn.Module, before: list[Tensor]) -> None:
        """Make BatchNorm's running statistics what they were if one copy had seen the slots' batches in turn.

        Each slot moved its copy from the same r by its own batch s_k, to r_k = (1 - m) r + m s_k. One copy would have
        gone from r to r_0, then to r_1 + (1 - m) (r_0 - r), and so on.

        Args:
            module: whose BatchNorms have seen this slot's batch.
            before: `statistics_before` that.
        """
        if self.shape.slots == 1:
            return
        momenta = [m for part in module.modules() if isinstance(part, nn.BatchNorm2d) for m in momenta_of(part)]
        assert len(momenta) == len(before), "a buffer that is not BatchNorm's"

        # One exchange for all buffers; double holds the integer batch counters exactly.
        flat = torch.cat([buffer.detach().double().flatten() for buffer in module.buffers()])
        slots = self.groups.experts.all_gather(flat, "running statistics of the trunks, in turn")

        old = torch.cat([buffer.double().flatten() for buffer in before])
        keep = torch.cat(
            [torch.full_like(b, 1 - m, dtype=torch.float64).flatten() for b, m in zip(before, momenta, strict=True)]
        )
        now = slots[0]
        for seen in slots[1:]:
            now = seen + keep * (now - old)
        for buffer, values in zip(module.buffers(), now.split([b.numel() for b in before]), strict=True):
            buffer.copy_(values.view_as(buffer))

    def sum_over_data(self, values: Tensor, what: str) -> Tensor:
        """Sum over the replicas of this slot, in place; the same bits on each of them. `what` they are, in words."""
        if self.shape.replicas > 1:
            self.groups.data.all_reduce(values, what)
        return values

    def synchronise_batchnorm(self, model: nn.Module, of_whom: str = "") -> None:
        """Make every BatchNorm of a model count the images of all replicas of this slot.

        Args:
            model: of any kind.
            of_whom: whose statistics they are, if not the ensemble's that trains: "of teacher ...".
        """
        if self.shape.replicas > 1:
            for module in model.modules():
                if (kind := synchronised(module)) is not None:
                    # The class alone: names, parameters and whoever refers to the module stay as they are.
                    module.__class__ = kind
                    module.group, module.of_whom = self.groups.data, of_whom  # type: ignore[assignment]

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give all replicas of this slot the running statistics of the first."""
        if self.shape.replicas > 1:
            for buffer in model.buffers():
                self.groups.data.broadcast(buffer, "running statistics")
