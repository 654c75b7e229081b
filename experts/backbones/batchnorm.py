"""BatchNorm whose layers count their batches together: one operation for a network, where torch takes one per layer.

Nothing reads the counters, since every layer has a fixed momentum. They are kept because checkpoints and other people's
programs know them.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """As torch's, but counts no batch; `counted` does."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        assert self.momentum is not None  # a mean over all batches would need the counter
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)


Counted = TypeVar("Counted", bound=nn.Module)


def counted(module: Counted) -> Counted:
    """Return a module that counts its batches for every `BatchNorm2d` in it, whenever it is called in training."""
    # A list is no part of a module's state; a copy of the module has one of the copied layers.
    cast(Any, module).norms = [part for part in module.modules() if isinstance(part, BatchNorm2d)]
    module.register_forward_pre_hook(_count)
    return module


@torch.no_grad()
def _count(module: Any, _: Any) -> None:
    # A layer that was given another class since then counts for itself.
    counters: list[Any] = [n.num_batches_tracked for n in module.norms if n.training and type(n) is BatchNorm2d]
    if counters:
        torch._foreach_add_(counters, 1)
