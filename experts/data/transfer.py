"""Copies from the host to the device that computes, for which the host does not wait."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Return values on a device. Where they have to be copied, the host goes on before the copy is done.

    On the CPU nothing is copied that has the right type already: the result then shares memory with `values`.

    Args:
        values: a tensor on any device, or an array.
        dtype: of the result; None keeps that of `values`.

    Raises:
        RuntimeError: a CUDA graph is being captured, whose replays would all copy what lies in this memory then.
    """
    device = torch.device(device)
    tensor = torch.from_numpy(np.asarray(values, order="C")) if isinstance(values, np.ndarray) else values
    if tensor.device.type == "cpu":
        tensor = tensor.to(dtype=dtype)  # here, since a copy that also converts is made from memory that is not pinned
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():  # CUDA does not refuse it
                raise RuntimeError("a step that is captured copies from the host; needed StepDraws for what it copies")
            # A GPU copies in the background from page-locked memory alone. The allocator of such memory gives it to
            # others only after the copy.
            tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


class Constant:
    """A tensor on the host that never changes, with a copy for each device and type that asked for one.

    Kept, because a captured graph would repeat a copy from memory that has long been used for something else.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._copies: dict[tuple[torch.device, torch.dtype | None], Tensor] = {}

    def on(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor as `to_device` does, the same object in every call."""
        asked = torch.device(device), dtype
        if asked not in self._copies:
            self._copies[asked] = to_device(self.values, *asked)
        return self._copies[asked]
