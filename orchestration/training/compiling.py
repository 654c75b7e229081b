"""The network of a stage in compiled code, if `engine.compile` says so.

torch compiles the trunk and the features of each expert for whole batches, those of training and those of evaluation,
in place: modules keep their names, weights and hooks. Experts of one shape share one code. Everything else runs as it
always does: heads and losses, which are small; batches that are not whole, as the last of an epoch may be; and
BatchNorms that exchange between replicas, with the parts that have them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experts.batches import share
from orchestration.training.batchnorm import SynchronisedBatchNorm2d
from orchestration.training.stage_setup import TrainingSetup

_MOST_CODES = 64  # of all parts of all stages of a process; torch would stop at 8, and say nothing


class _WholeBatches:
    """Stands for a module when it is called.

    Args:
        module: that is called.
        rows: images of a whole batch in training.
        scored: images of a whole batch in evaluation.
        beat: is called after each use, since the first may take a minute.
    """

    def __init__(self, module: nn.Module, rows: int, scored: int, beat: Callable[[], None]) -> None:
        self._plain: Any = module._call_impl
        self._compiled: Any = torch.compile(module._call_impl, dynamic=False)
        self._rows, self._scored, self._beat = rows, scored, beat

    def __call__(self, x: Any, *more: Any, **words: Any) -> Any:
        found = (self._compiled if self._is_whole(len(x)) else self._plain)(x, *more, **words)
        self._beat()
        return found

    def _is_whole(self, rows: int) -> bool:
        """Say whether these are whole batches. A rule of numbers alone: a resumed run computes in the same code."""
        if not torch.is_grad_enabled():
            return rows == self._scored
        return rows > 0 and rows % self._rows == 0  # flows may lay several under one another


def compile_parts(setup: TrainingSetup, beat: Callable[[], None]) -> None:
    """Let the trunk and the features of a stage's experts compute in compiled code.

    The code is made when a module is first called.

    Args:
        setup: the stage's.
        beat: tells that this worker is alive.

    Raises:
        ValueError: this machine has no compiler.
    """
    _check_compiler(setup.mesh.device)
    _keep_code()
    import torch._dynamo.config as tracing
    import torch._inductor.config as generating

    generating.deterministic = torch.are_deterministic_algorithms_enabled()
    tracing.recompile_limit = max(tracing.recompile_limit, _MOST_CODES)
    images = min(setup.batches.config.batch_size, setup.batches.draws_per_epoch)
    first, last = share(images, setup.mesh.replica, setup.mesh.shape.replicas)
    for module in (setup.model.trunk, *(expert.features for expert in setup.model.members())):
        exchanges = any(isinstance(part, SynchronisedBatchNorm2d) for part in module.modules())
        if last > first and not exchanges and any(True for _ in module.parameters()):
            # As `Module.compile` sets it: no part of a module's state, so copies and files do not have it.
            module._compiled_call_impl = _WholeBatches(module, last - first, setup.scored_at_once, beat)


_CACHE = Path("~/.cache/expertail/compiled")  # of the user, since what lies there is run
_CACHE_KEY = "TORCHINDUCTOR_CACHE_DIR"


def _keep_code() -> None:
    """Have torch keep compiled code in the user's cache, unless the environment names another folder."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch itself writes its default there, below /tmp, whenever a part of its compiler is imported.
    if os.environ.get(_CACHE_KEY, default_cache_dir()) == default_cache_dir():
        folder = _CACHE.expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that cannot be written: the default will do until the node starts again
            return
        if os.access(folder, os.W_OK):
            os.environ[_CACHE_KEY] = str(folder)


def _check_compiler(device: torch.device) -> None:
    """Raise ValueError unless torch can make code for the device."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "engine.compile = true: found no C++ compiler on this worker's node; needed one, which torch calls; "
            "install g++ on every node, or set engine.compile=false"
        ) from error
    if device.type == "cuda" and not has_triton():
        raise ValueError(
            "engine.compile = true: this worker's torch cannot use Triton, which makes code for a GPU; install triton "
            "on every node, or set engine.compile=false"
        )
