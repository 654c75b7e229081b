"""Engines turn the gradients of a step into moved weights. Two of them behind one small interface.

`TorchEngine` is the control run: plain PyTorch, every sum written out. `DeepSpeedEngine` (deepspeed_engine.py) does the
same with ZeRO. Tests compare the two.

Gradients. Every worker differentiates the whole ensemble's loss, as its share of the global batch, through its own
experts only. So a parameter's gradient is the *sum* of what the workers that hold it computed: over all workers for
shared parameters (the trunk), over the data axis for an expert's own.

A step that is not finite. Nothing here waits for the device. A flag there, `ok`, holds the weights back from the first
loss or gradient that is not finite on; all workers agree on it before any weight moves. `TrainingStep` keeps where it
was found, and the trainer reads that after a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from orchestration.config.recipe import OptimizerConfig
from orchestration.config.run_config import EngineConfig
from orchestration.training.exchange import Alone, Group
from orchestration.training.leaves import Leaf, Leaves
from orchestration.training.mesh import Mesh
from orchestration.training.optimizer import HeldSGD, first_not_finite

IN_WORDS = {"trunk": "trunk", "experts": "experts", "shared": "shared last layer"}
"""The parts whose gradients are summed apart, as `plan` calls them."""
CHECK = "whether all gradients are finite"
"""The exchange in which workers agree on a step, in words."""


class Engine(Protocol):
    """Trains the parameters of one worker's share of an ensemble.

    Attributes:
        ok: bool scalar on the device; false once a loss or a gradient was not finite, on any worker.
    """

    ok: Tensor

    def step(self, gradients: Sequence[Tensor], loss: Tensor, lr: float) -> Tensor:
        """Sum gradients over the mesh and move the weights, unless something is not finite or was so before.

        Every worker of the mesh must take part. The host does not wait.

        Args:
            gradients: of this worker's share of the loss, one flat tensor per leaf. They may be written to, but keep
                their memory, which a captured step fills again.
            loss: of the whole batch, a scalar.
            lr: base learning rate.

        Returns:
            For each leaf held here, the index of its first gradient that is not finite, -1 if all are; float64 [L].
            With ZeRO each worker looks at the gradients that it moves weights by.
        """
        ...

    def momentum(self) -> dict[str, Tensor]:
        """Return whole momentum tensors by parameter name; {} before the first step. All must call it.

        They lie where the weights lie, and the next step may change them.
        """
        ...

    def restore(self, momentum: dict[str, Tensor]) -> None:
        """Take over the weights just loaded into the module, and these momentum tensors (all or none)."""
        ...

    def close(self) -> None:
        """Free hooks and buffers; the process serves another stage."""
        ...


class TorchEngine:
    """Plain PyTorch. Sums the gradient of a leaf in one exchange.

    Args:
        leaves: what learns.
        mesh: this worker's place.
        optimizer, config: as in the run's config.
    """

    def __init__(self, leaves: Leaves, mesh: Mesh, optimizer: OptimizerConfig, config: EngineConfig) -> None:
        self.leaves = leaves
        self.mesh = mesh
        self.config = config
        self.ok = torch.ones((), dtype=torch.bool, device=mesh.device)
        self.optimizer = HeldSGD(leaves.all, optimizer, self.ok)

    def step(self, gradients: Sequence[Tensor], loss: Tensor, lr: float) -> Tensor:
        """See `Engine.step`."""
        self.sum_gradients(gradients)
        # With one slot everyone holds every leaf, and has seen it after the sum.
        holders = self.mesh.groups.everyone if self.mesh.shape.slots > 1 else Alone()
        places = check(self.ok, holders, loss, gradients)
        self.move(gradients, lr)
        return places

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum each gradient over the workers that hold its leaf."""
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            group_of(leaf, self.mesh).all_reduce(gradient, f"gradient, {IN_WORDS[leaf.part]}")

    def move(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Move the weights by gradients that are summed."""
        self.optimizer.set_lr(lr)
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.flat.grad = gradient
        self.optimizer.step()
        for leaf in self.leaves:
            leaf.flat.grad = None

    def momentum(self) -> dict[str, Tensor]:
        """See `Engine.momentum`."""
        found: dict[str, Tensor] = {}
        for leaf in self.leaves:
            buffer = self.optimizer.state[leaf.flat].get("momentum_buffer")
            if buffer is not None:
                found |= leaf.by_name(buffer.detach())
        return found

    def restore(self, momentum: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        for leaf in self.leaves:
            if all(place.name in momentum for place in leaf.places):
                self.optimizer.state[leaf.flat]["momentum_buffer"] = leaf.gathered(momentum)

    def close(self) -> None:
        """See `Engine.close`."""
        self.optimizer.state.clear()


def group_of(leaf: Leaf, mesh: Mesh) -> Group:
    """Return the group of workers that hold a leaf."""
    return mesh.groups.data if leaf.part == "experts" else mesh.groups.everyone


@torch.no_grad()
def check(ok: Tensor, workers: Group, loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Make `ok` false if the loss or a gradient is not finite here or on another worker.

    Args:
        ok: bool scalar, written to.
        workers: to agree with.
        loss: of the whole batch, a scalar.
        gradients: flat and summed; those that only some workers hold, or pieces of them.

    Returns:
        The index of the first gradient that is not finite, for each of them, -1 if all are; float64 [L].
    """
    found = [first_not_finite(gradient) for gradient in gradients]
    # 0, or NaN: sums carry NaN to everyone.
    zero = torch.stack([(loss - loss).double(), *(zero for zero, _ in found)]).sum()
    workers.all_reduce(zero, CHECK)
    ok.logical_and_(zero == 0)
    return torch.stack([place for _, place in found]) if found else zero.new_zeros(0)
