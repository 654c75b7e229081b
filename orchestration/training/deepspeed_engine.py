"""DeepSpeed behind the engine interface, and the only file that imports it.

One ZeRO engine per part that learns: the trunk's spans all workers, the experts' the data axis of their slot. ZeRO gets
leaves and their gradients, one after the other and in one order on all workers; it never sees the network.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from experts.data.transfer import to_device
from orchestration.config.recipe import OptimizerConfig
from orchestration.config.run_config import EngineConfig
from orchestration.training.engine import check
from orchestration.training.exchange import TorchGroup
from orchestration.training.leaves import PARTS, Leaf, Leaves
from orchestration.training.mesh import Mesh
from orchestration.training.optimizer import HeldSGD


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
    # The table of what can be compiled is written here, not read: reading it runs compilers to find out.
    deepspeed.ops.__compatible_ops__ = {}
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
    """The leaves of one part, as ZeRO sees them. The modules that hold views of them are not its business."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        super().__init__()
        self.flats = nn.ParameterList([leaf.flat for leaf in leaves])


class DeepSpeedEngine:
    """ZeRO stage 1 or 2 over a mesh of expert slots and data replicas. Arguments as of `TorchEngine`."""

    def __init__(self, leaves: Leaves, mesh: Mesh, optimizer: OptimizerConfig, config: EngineConfig) -> None:
        deepspeed = import_deepspeed(gpu=mesh.device.type == "cuda")
        # Ray shows each worker one GPU, which is number 0 there, whatever a launcher round Ray has numbered.
        os.environ["LOCAL_RANK"] = "0"
        os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
        self.leaves = leaves
        self.mesh = mesh
        self.ok = torch.ones((), dtype=torch.bool, device=mesh.device)
        self._engines: dict[str, Any] = {}
        everyone, replicas = _Axis(dist.group.WORLD), _Axis(mesh.groups.data.handle or dist.group.WORLD)
        for part in PARTS:
            if own := leaves.of(part):  # DeepSpeed refuses an engine without trainable parameters
                axis = replicas if part == "experts" else everyone
                held = HeldSGD(own, optimizer, self.ok)
                self._engines[part] = _initialize(deepspeed, _Part(own), held, axis, config)
        leaves.relink()  # ZeRO has moved the leaves to memory of its own

    def step(self, gradients: Sequence[Tensor], loss: Tensor, lr: float) -> Tensor:
        """See `Engine.step`."""
        self._sum_gradients(gradients)
        # After ZeRO's sums and before its step: each worker looks at the pieces that it moves weights by.
        groups = list(self._groups())
        pieces = [torch.cat([p.flatten() for p in zero.averaged_gradients[i]]) for zero, i in groups]
        places = check(self.ok, self.mesh.groups.everyone, loss, pieces)
        for engine in self._engines.values():
            engine.optimizer.optimizer.set_lr(lr)
            engine.step()
        starts = [zero.partition_size[i] * dist.get_rank(zero.real_dp_process_group[i]) for zero, i in groups]
        return torch.where(places < 0, places, places + to_device(np.array(starts, dtype=float), places.device))

    def _sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Let ZeRO sum the gradients and keep this worker's piece of each, without a graph or hooks."""
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            # ZeRO averages over the workers of its axis, and we need sums.
            workers = dist.get_world_size(self._engines[leaf.part].optimizer.dp_process_group)
            # Never the tensor that was given: ZeRO moves its gradients to other memory.
            leaf.flat.grad = gradient * workers if workers > 1 else gradient.detach()
        for engine in self._engines.values():
            zero = engine.optimizer
            # What its hooks would do, were the gradients to come from a backward pass.
            zero.set_gradient_accumulation_boundary(True)
            zero.setup_buckets()
            zero.reduce_gradients()

    def momentum(self) -> dict[str, Tensor]:
        """See `Engine.momentum`."""
        # ZeRO has cut each leaf into equal parts, one per worker of its axis. Whole tensors are put together here, so
        # that a checkpoint fits any mesh.
        found: dict[str, Tensor] = {}
        for (zero, i), leaf in zip(self._groups(), self.leaves, strict=True):
            buffer = zero.optimizer.state.get(zero.single_partition_of_fp32_groups[i], {}).get("momentum_buffer")
            if buffer is not None:
                group = zero.real_dp_process_group[i]
                found |= leaf.by_name(torch.cat(TorchGroup(group).all_gather(buffer, "momentum")))
        return found

    def restore(self, momentum: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        for engine in self._engines.values():
            engine.optimizer.refresh_fp32_params()  # else the next step starts from the weights before loading

        # Written into the optimiser's own state: DeepSpeed's functions for it fail before the first step.
        for (zero, i), leaf in zip(self._groups(), self.leaves, strict=True):
            if not all(place.name in momentum for place in leaf.places):  # a checkpoint from before the first step
                continue
            partition, group = zero.single_partition_of_fp32_groups[i], zero.real_dp_process_group[i]
            flat = torch.zeros_like(zero.bit16_groups_flat[i], dtype=partition.dtype)  # with ZeRO's padding at its end
            flat[: leaf.flat.numel()] = leaf.gathered(momentum)
            own = flat.chunk(dist.get_world_size(group))[dist.get_rank(group)]
            zero.optimizer.state[partition]["momentum_buffer"] = own.clone()

    def _groups(self) -> Iterator[tuple[Any, int]]:
        """Yield every ZeRO optimiser with the index of each of its groups, in the order of the leaves."""
        for engine in self._engines.values():
            for i in range(len(engine.optimizer.param_groups)):
                yield engine.optimizer, i

    def close(self) -> None:
        """See `Engine.close`."""
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
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # our own SGD
        "timers": {"throughput": {"enabled": False}},  # it waits for the device round every step
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "reduce_scatter": False,  # refuses float64; trunks and experts here are small
            "contiguous_gradients": True,
            "compute_grad_norm": False,  # only clipping needs it; it would wait for the device
            # A leaf is summed in place if it is larger than the bucket. Else ZeRO would copy it into a new bucket in
            # every step.
            "reduce_bucket_size": 1,
            "allgather_bucket_size": 20_000_000,
        },
    }


def _initialize(deepspeed: Any, part: _Part, optimizer: HeldSGD, axis: _Axis, config: EngineConfig) -> Any:
    with _float64() if config.precision == "float64" else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=part, optimizer=optimizer, config=_settings(config), mpu=axis, dist_init_required=False
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
