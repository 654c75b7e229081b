"""The float type that losses and scores are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half types as float32, everything else as it is: a softmax over thousands of classes needs the bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
