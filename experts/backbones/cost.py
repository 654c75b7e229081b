"""The cost of a forward pass, for planning."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(module: nn.Module, inputs: Tensor) -> int:
    """Count multiply-adds of convolutions and matrix products in one forward pass in evaluation mode.

    A training step costs about three times as much. A copy of the module is run, so neither the mode nor the BatchNorm
    statistics of the module change.

    Args:
        module: a trunk, an expert or a whole ensemble.
        inputs: of the module; a batch of one gives the cost per image.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(module).eval()(inputs)
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations
