"""The float type that losses and scores are computed in, and what a GPU makes of float32."""

from __future__ import annotations

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


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute without TF32 inside the block, then as before."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
