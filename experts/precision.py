"""The float type that losses and scores are computed in, what a GPU makes of float32, and whether it repeats itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half types as float32, everything else as it is: a softmax over thousands of classes needs the bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def allow_tf32(allowed: bool) -> None:
    """Say whether convolutions on a GPU may round their float32 inputs to TF32's 10 binary digits. Products never do.

    A switch of the whole process, which a backward pass reads too. torch allows it unless told otherwise; on RIDE's
    scale of 30 the gradient then is 5 % off (docs/results.md).
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = False


def repeat_bits(asked: bool) -> None:
    """Say whether a GPU must compute the same bits from the same numbers, or may take faster kernels that do not.

    A switch of the whole process, to be set before its first product of matrices. Operations that have no such kernel
    then raise RuntimeError.
    """
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not `use_deterministic_algorithms`: the same switch, which loads the compiler too, for 2 s.
    torch.set_deterministic_debug_mode("error" if asked else "default")
    # By itself the switch also writes NaN to all new memory, one more kernel for each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = asked
    torch.backends.cudnn.benchmark = False  # it would choose kernels by their time


def faster_memory_format(device: torch.device, precision: str = "float32") -> torch.memory_format:
    """Return how the weights of convolutions should lie in memory to compute fast; see docs/speed.md for a CPU.

    A CPU's float32 and bfloat16 kernels and a GPU's tensor cores, which compute bfloat16 and TF32, want the channels of
    a pixel side by side. float64, for which nobody has written such kernels, does not.

    Args:
        device: that computes.
        precision: as `engine.precision`.
    """
    last = precision != "float64" if device.type == "cpu" else precision in ("autocast", "tf32")
    return torch.channels_last if last else torch.contiguous_format


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute without TF32 inside the block, then as before."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
