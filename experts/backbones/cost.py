"""What a forward pass costs, for planning."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(module: nn.Module, inputs: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products in one forward pass in evaluation mode.

    A training step costs about three times as much. The module is run on a copy, so neither its mode nor its BatchNorm
    statistics change.

    Args:
        module: a trunk, an expert or a whole ensemble.
        inputs: what it takes, a batch of one for the cost per image.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(module).eval()(inputs)
    return counter.get_total_flops() // 2
