"""SGD whose step a flag on the device can hold back, so that the host need not wait to learn whether all is finite."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orchestration.config.recipe import OptimizerConfig
from orchestration.training.leaves import Leaf


class HeldSGD(torch.optim.Optimizer):
    """SGD with momentum and weight decay, as `torch.optim.SGD` to the last bit, while `ok` is true.

    Once it is false neither weights nor momentum move. The operations are torch's own for a list of tensors, one after
    the other: fused kernels round differently.

    Args:
        leaves: one group of parameters each.
        config: of the stage.
        ok: bool scalar on the device of the leaves; whoever checks a step writes to it.
    """

    def __init__(self, leaves: Sequence[Leaf], config: OptimizerConfig, ok: Tensor) -> None:
        groups = [{"params": [leaf.flat], "lr_factor": leaf.lr_factor} for leaf in leaves]
        super().__init__(groups, {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay})
        self.nesterov = config.nesterov
        self.ok = ok

    # Torch wraps these for its compiler, which each process would load for them: 1.5 s before its first step.
    # Nothing compiles an optimiser here.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def set_lr(self, lr: float) -> None:
        """Set the learning rates of the next step from the base rate."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_factor"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            gradient = gradient.add(weights, alpha=group["weight_decay"])
        if group["momentum"]:
            gradient = self._with_momentum(weights, gradient, group["momentum"])
        weights.add_(torch.where(self.ok, gradient, 0), alpha=-group["lr"])

    def _with_momentum(self, weights: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """Return the direction of the step, and keep the new momentum."""
        state = self.state[weights]
        before = state.get("momentum_buffer")
        if before is None:  # the first step: no momentum yet
            moving = gradient
            state["momentum_buffer"] = torch.where(self.ok, moving, 0)
        else:
            moving = before.mul(momentum).add_(gradient)
            torch.where(self.ok, moving, before, out=before)
        return gradient.add(moving, alpha=momentum) if self.nesterov else moving


def first_not_finite(values: Tensor) -> tuple[Tensor, Tensor]:
    """Look for a number that is not finite in a flat tensor, without waiting for the device.

    Returns:
        A scalar that is 0, or NaN if there is one; and the index of the first, -1 if there is none (float64 scalars).
    """
    # x - x is 0 for a finite number and NaN for any other; `max` takes NaN for the greatest, and the first of equals.
    found = (values - values).max(dim=0)
    index = torch.where(found.values == 0, -1, found.indices)
    return found.values.double(), index.double()
