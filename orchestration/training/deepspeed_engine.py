"""DeepSpeed behind the engine interface, and the only file that imports it.

One ZeRO engine per non-empty group of parameters: the trunk's spans all workers, the experts' the data axis of their
slot. DeepSpeed averages over an engine's workers, and we need sums. The loss comes multiplied by the replicas, which
makes the average over the data axis a sum; a hook multiplies trunk gradients by the slots, which does the rest.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experts.ensemble import Ensemble
from experts.flow import Result
from orchestration.config.recipe import OptimizerConfig
from orchestration.config.run_config import EngineConfig
from orchestration.training.engine import NonFiniteGradient, casting, lr_groups, set_lr, sgd
from orchestration.training.exchange import TorchGroup
from orchestration.training.mesh import Mesh


def import_deepspeed(*, gpu: bool) -> ModuleType:
    """Import DeepSpeed for CPU or GPU; the first call in a process decides.

    DeepSpeed's autotuner imports MLflow if it is there, which costs every worker 4 s and 100 MB for nothing, so it is
    hidden while DeepSpeed loads. DeepSpeed treats MLflow as optional and runs without.
    """
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it takes CUDA wherever torch was built with it
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

    hide = "mlflow" not in sys.modules
    if hide:  # None makes `import mlflow` raise ImportError
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if hide:
            del sys.modules["mlflow"]

    from deepspeed.runtime import compiler

    # Its Muon optimiser, loaded with any ZeRO engine, compiles kernels on import: 5 s that SGD never uses.
    with patch.object(compiler, "compile", lambda *_, **__: lambda function: function):
        import deepspeed.runtime.zero.muon.muon_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The shared-memory exchange for CPUs is compiled at first use: 20 s and a compiler, for nothing that gloo lacks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _Axis:
    """The workers of one ZeRO engine, in the form DeepSpeed asks for (Megatron's 'mpu'); no model parallelism."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.group)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


class _Part(nn.Module):
    """One part of an ensemble, for a flow to run.

    It enters autocast itself, because DeepSpeed leaves the autocast of its caller. Beside the result it returns a zero
    that depends on all its parameters: ZeRO waits for a gradient of each in every step, even if a batch has no image
    for an expert or an expert's loss does not reach the trunk.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self._context = partial(casting, config, device)

    def forward(self, run: Callable[[nn.Module], Result]) -> tuple[Result, Tensor | None]:
        with self._context():
            result = run(self.module)
        learning = [p for p in self.module.parameters() if p.requires_grad]
        return result, _Zero.apply(*learning) if learning else None


class _Zero(torch.autograd.Function):
    """Zero, with a gradient of zero for each of some tensors.

    A sum of the parameters times zero would do the same, but becomes NaN with them, and reads every weight.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        # One element, expanded: it is added to a gradient and never written to.
        return tuple(t.new_zeros(()).expand_as(t) for t in ctx.saved_tensors)


class DeepSpeedEngine:
    """ZeRO stage 1 or 2 over a mesh of expert slots and data replicas. Arguments as of `TorchEngine`."""

    def __init__(
        self,
        model: Ensemble,
        mesh: Mesh,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        lr_factors: Mapping[str, float] | None = None,
        part_factors: Mapping[str, float] | None = None,
    ) -> None:
        deepspeed = import_deepspeed(gpu=mesh.device.type == "cuda")
        # Ray shows each worker one GPU, which is number 0 there, whatever a launcher round Ray has numbered.
        os.environ["LOCAL_RANK"] = "0"
        os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
        self.mesh = mesh
        self.names = model.names
        # ZeRO 2 reduces gradients during the backward pass: parameters must get theirs in one order on all workers.
        self.same_order = config.zero_stage == 2 and mesh.shape.workers > 1
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._engines: dict[str, Any] = {}
        self._parts: dict[str, nn.Module] = {}
        self._zeros: list[Tensor] = []
        everyone, replicas = _Axis(dist.group.WORLD), _Axis(mesh.groups.data.handle or dist.group.WORLD)
        for name, axis in (("trunk", everyone), ("experts", replicas), ("shared", everyone)):
            part = _Part(getattr(model, name), config, mesh.device)
            self._parts[name] = part
            learning = [(f"{name}.{k}", p) for k, p in part.module.named_parameters() if p.requires_grad]
            if learning:  # DeepSpeed refuses an engine without trainable parameters
                groups = lr_groups(learning, lr_factors or {}, part_factors or {})
                self._parts[name] = self._engines[name] = _initialize(deepspeed, part, groups, axis, optimizer, config)

        # The engines of trunk and shared modules average over slots x replicas, and the loss is multiplied by the
        # replicas only. The hook multiplies by the slots. An expert's engine averages over replicas: no hook.
        slots = mesh.shape.slots
        self._hooks = [
            p.register_hook(lambda gradient: gradient * slots)
            for name, p in model.named_parameters()
            if p.requires_grad and not name.startswith("experts.") and slots > 1
        ]

    def trunk(self, run: Callable[[nn.Module], Result]) -> Result:
        return self._run("trunk", run)

    def experts(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        return self._run("experts", run)

    def shared(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        return self._run("shared", run)

    def _run(self, name: str, run: Callable[[Any], Result]) -> Result:
        result, zero = self._parts[name](run)  # through the engine where there is one: its forward prepares ZeRO
        if zero is not None and name in self._engines:
            self._zeros.append(zero)
        return result

    def step(self, loss: Tensor, lr: float) -> None:
        loss = loss + sum(zero.to(loss.dtype) for zero in self._zeros)
        self._zeros.clear()

        # Plain `backward`, not an engine's: one graph runs through all engines, whose hooks catch their gradients.
        (loss * self.mesh.shape.replicas).backward()

        for name, engine in self._engines.items():
            set_lr(engine.optimizer, lr)
            engine.step()
            if engine.skipped_steps:  # ZeRO says nothing: it leaves the weights and counts
                raise NonFiniteGradient(f"gradient is not finite in the {name}; DeepSpeed skipped the step")

    def momentum(self) -> dict[str, Tensor]:
        # ZeRO has flattened each group and cut it into equal parts, one per worker of its axis. Whole tensors are put
        # together here, so that a checkpoint fits any mesh.
        found: dict[str, Tensor] = {}
        for zero, i in self._groups():
            partition = zero.single_partition_of_fp32_groups[i]
            buffer = zero.optimizer.state.get(partition, {}).get("momentum_buffer")
            if buffer is None:
                continue
            group = zero.real_dp_process_group[i]
            flat = torch.cat(TorchGroup(group).all_gather(buffer, "momentum")).cpu()
            for name, place, shape in self._layout(zero, i):
                found[name] = flat[place].view(shape).clone()
        return found

    def restore(self, momentum: dict[str, Tensor]) -> None:
        for engine in self._engines.values():
            engine.optimizer.refresh_fp32_params()  # else the next step starts from the weights before loading

        # Written into the optimiser's own state: DeepSpeed's functions for it fail before the first step.
        for zero, i in self._groups():
            layout = self._layout(zero, i)
            if not all(name in momentum for name, _, _ in layout):  # a checkpoint from before the first step
                continue
            partition = zero.single_partition_of_fp32_groups[i]
            flat = torch.zeros_like(zero.bit16_groups_flat[i], dtype=partition.dtype)  # with ZeRO's padding at its end
            for name, place, _ in layout:
                flat[place] = momentum[name].to(flat.device, flat.dtype).flatten()
            group = zero.real_dp_process_group[i]
            own = flat.chunk(dist.get_world_size(group))[dist.get_rank(group)]
            zero.optimizer.state[partition]["momentum_buffer"] = own.clone()

    def _groups(self) -> Iterator[tuple[Any, int]]:
        """Yield every ZeRO optimiser with the index of each of its groups; a group has one learning rate."""
        for engine in self._engines.values():
            for i in range(len(engine.optimizer.param_groups)):
                yield engine.optimizer, i

    def _layout(self, zero: Any, i: int) -> list[tuple[str, slice, torch.Size]]:
        """Return where each parameter lies in the flat buffer of a ZeRO optimiser's group."""
        return [
            (self._names[id(p)], slice(start, start + p.numel()), p.shape)
            for p, start in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True)
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for engine in self._engines.values():
            engine.destroy()
        self._engines.clear()
        _forget_world()  # the process may serve another mesh, with other ranks


def _settings(config: EngineConfig) -> dict[str, Any]:
    """Return DeepSpeed's config. Values are written out where a default changed between releases or changes results."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # never used: batches come from our own loader
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,  # torch's own SGD
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "reduce_scatter": False,  # refuses float64; trunks and experts here are small
            "contiguous_gradients": True,
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 20_000_000,
        },
    }


def _initialize(
    deepspeed: Any,
    part: nn.Module,
    groups: list[dict[str, Any]],
    axis: _Axis,
    optimizer: OptimizerConfig,
    config: EngineConfig,
) -> Any:
    with _float64() if config.precision == "float64" else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=part,
            optimizer=sgd(groups, optimizer),
            config=_settings(config),
            mpu=axis,
            dist_init_required=False,
        )
    return engine


@contextmanager
def _float64() -> Iterator[None]:
    """Let ZeRO keep master weights, and sum gradients, in float64. It offers float32 at most.

    Without it a float64 run is rounded to float32 at every step, and RIDE's scale of 30 amplifies that.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine as Base
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    double = torch.float64
    with (
        patch.object(Base, "get_data_types", lambda self: (double, double)),
        patch.object(Base, "communication_data_type", double),
        patch.object(Zero, "_configure_master_weights", lambda self, **_: double),
    ):
        yield


def _forget_world() -> None:
    """Reset what DeepSpeed keeps about the torch world in module variables, so that the next mesh can start."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    groups.mpu = None
    groups._WORLD_GROUP = None
