"""Which float type a loss or a score is computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Half types become float32, everything else stays: a softmax over thousands of classes needs the bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
