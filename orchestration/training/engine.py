"""Engines take a step: forward, backward, sums over the mesh, SGD. Two of them behind one small interface.

`TorchEngine` is the control run: plain PyTorch, every sum written out. `DeepSpeedEngine` (deepspeed_engine.py) does the
same with ZeRO. Tests compare the two.

Gradients. Every worker differentiates the whole ensemble's loss, as its share of the global batch, through its own
experts only. So a parameter's gradient is the *sum* of what the workers that hold it computed: over all workers for
shared parameters (the trunk), over the data axis for an expert's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from experts.ensemble import Ensemble, part_of
from experts.flow import Network, Result
from experts.precision import allow_tf32
from orchestration.config.recipe import OptimizerConfig
from orchestration.config.run_config import EngineConfig
from orchestration.training.mesh import Mesh

IN_WORDS = {"trunk": "trunk", "experts": "experts", "shared": "shared last layer"}
"""The parts whose gradients are summed apart, as `plan` calls them."""


class NonFiniteGradient(FloatingPointError):
    """A gradient is NaN or infinite. The parameters it belongs to have not moved."""


class Engine(Network, Protocol):
    """Trains the parameters of one worker's share of an ensemble; flows run its modules."""

    def step(self, loss: Tensor, lr: float) -> None:
        """Back-propagate this worker's share of the loss, sum gradients over the mesh, move the weights.

        Raises:
            NonFiniteGradient: on every worker that holds the parameter, before any weight of it moves.
        """
        ...

    def momentum(self) -> dict[str, Tensor]:
        """Return whole momentum tensors by parameter name, on the CPU; {} before the first step. All must call it."""
        ...

    def restore(self, momentum: dict[str, Tensor]) -> None:
        """Take over the weights just loaded into the module, and these momentum tensors (all or none)."""
        ...

    def close(self) -> None:
        """Free hooks and buffers; the process serves another stage."""
        ...


def casting(config: EngineConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context a network computes in: bfloat16 if engine.precision = autocast, else its weights' type."""
    if config.precision == "autocast":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def use_precision(config: EngineConfig) -> None:
    """Set what this process computes float32 convolutions in: a GPU's TF32 only if engine.precision = tf32."""
    allow_tf32(config.precision == "tf32")


class TorchEngine:
    """Plain PyTorch. Sums gradients of all parameters of a group in one flat exchange.

    Args:
        model: its parameters that require gradients learn.
        mesh: this worker's place.
        optimizer, config: as in the run's config.
        lr_factors: factor of an expert's learning rate, by name; 1 if missing.
        part_factors: the same for "trunk", "features", "heads" and "gates" of all experts.
    """

    def __init__(
        self,
        model: Ensemble,
        mesh: Mesh,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        lr_factors: Mapping[str, float] | None = None,
        part_factors: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.config = config
        self.names = model.names
        self.same_order = False  # gradients are summed after the backward pass, in an order of our own
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = sgd(lr_groups(self.parameters.items(), lr_factors or {}, part_factors or {}), optimizer)

    def trunk(self, run: Callable[[nn.Module], Result]) -> Result:
        return self._run(run, self.model.trunk)

    def experts(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        return self._run(run, self.model.experts)

    def shared(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        return self._run(run, self.model.shared)

    def _run(self, run: Callable[[Any], Result], module: nn.Module) -> Result:
        with casting(self.config, self.mesh.device):
            return run(module)

    def step(self, loss: Tensor, lr: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(loss)

        # After the sum, which carries NaN to every worker that holds the parameter: all of them stop, none waits.
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise NonFiniteGradient(_bad_parameter(self.parameters))

        set_lr(self.optimizer, lr)
        self.optimizer.step()

    def backward(self, loss: Tensor) -> None:
        """Leave in every parameter its gradient of the whole batch."""
        loss.backward()
        for p in self.parameters.values():
            if p.grad is None:  # this batch did not reach it here; other workers wait for its share
                p.grad = torch.zeros_like(p)
        if self.mesh.shape.workers > 1:
            self.sum_gradients()

    def sum_gradients(self) -> None:
        """Sum each gradient over the workers that hold its parameter. All of them list parameters in the same order."""
        groups = self.mesh.groups
        for group, parts in ((groups.everyone, ("trunk", "shared")), (groups.data, ("experts",))):
            of_part = {part: self.parameters_of(part) for part in parts}
            parameters = [p for found in of_part.values() for p in found]
            if parameters:
                flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
                words = [IN_WORDS[part] for part, found in of_part.items() if found]
                group.all_reduce(flat, f"gradient, {' and '.join(words)}")
                for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                    p.grad = total.view_as(p)

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        """Return what learns of the "trunk", the "experts" held here, or the modules "shared" after all experts."""
        return [p for name, p in self.parameters.items() if name.startswith(f"{part}.")]

    def momentum(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {
            name: state[p]["momentum_buffer"].detach().cpu().clone()
            for name, p in self.parameters.items()
            if state.get(p, {}).get("momentum_buffer") is not None
        }

    def restore(self, momentum: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            if name in momentum:
                self.optimizer.state[p]["momentum_buffer"] = momentum[name].to(p.device, p.dtype).clone()

    def close(self) -> None:
        self.optimizer.state.clear()


def sgd(groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> torch.optim.SGD:
    """Return the optimiser of a stage over `lr_groups`. `set_lr` sets its learning rate before every step."""
    return torch.optim.SGD(
        list(groups),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def lr_groups(
    parameters: Iterable[tuple[str, Tensor]], lr_factors: Mapping[str, float], part_factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Group parameters by learning rate, in the order of their first parameter.

    Args:
        lr_factors: of experts by name; what belongs to no expert has the factor 1.
        part_factors: of parts by name (`part_of`). The two are multiplied.
    """
    groups: dict[float, list[Tensor]] = {}
    for name, p in parameters:
        words = name.split(".")
        factor = lr_factors.get(words[1], 1.0) if words[0] == "experts" else 1.0
        groups.setdefault(factor * part_factors.get(part_of(name), 1.0), []).append(p)
    return [{"params": members, "lr_factor": factor} for factor, members in groups.items()]


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rates of the next step from the base rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def _bad_parameter(parameters: dict[str, nn.Parameter]) -> str:
    bad = [name for name, p in parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return f"gradient is not finite in {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}"
