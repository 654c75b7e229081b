"""The arithmetic of a run, as its `engine` keys say: in which types, how exactly, and how tensors lie in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from experts.precision import allow_tf32, faster_memory_format, repeat_bits
from orchestration.config.run_config import EngineConfig


def casting(config: EngineConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context a network computes in: bfloat16 if engine.precision = autocast, else its weights' type."""
    if config.precision == "autocast":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def use_precision(config: EngineConfig, device: torch.device) -> None:
    """Set how this process computes: TF32 only if engine.precision = tf32, the same bits always if deterministic."""
    allow_tf32(config.precision == "tf32")
    repeat_bits(config.deterministic and device.type == "cuda")  # a CPU does so anyway


def memory_format_for(config: EngineConfig, device: torch.device) -> torch.memory_format:
    """Return how images and the weights of convolutions lie in memory.

    Where the weights lie channels last, convolutions give results that do, whatever their input.
    """
    if config.memory_format != "auto":
        return torch.channels_last if config.memory_format == "channels_last" else torch.contiguous_format
    return faster_memory_format(device, config.precision)
