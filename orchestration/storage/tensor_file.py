"""A file of tensors kept in memory, to be filled again for every checkpoint and written as it is.

The safetensors library lays the file out, once; only the numbers change from one checkpoint to the next. So filling it
is one copy per tensor, and writing it touches no tensor: a second thread that writes does not hold up Python code of
the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor


class TensorFile:
    """The bytes of a safetensors file, and a view of them for each of its tensors.

    Args:
        tensors: whose names, shapes and types the file has; on any device. Their numbers are not looked at.
        pinned: whether the memory is page-locked, so that a GPU copies to it in the background.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, pinned: bool = False) -> None:
        empty = save({name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()})
        self._bytes = torch.empty(len(empty), dtype=torch.uint8, pin_memory=pinned)
        self._bytes.copy_(torch.frombuffer(bytearray(empty), dtype=torch.uint8))

        # Eight bytes with the length of the header, the header, the tensors: the documented layout of safetensors.
        first = 8 + int.from_bytes(empty[:8], "little")
        header = json.loads(empty[8:first])
        self._views = {}
        for name, t in tensors.items():
            begin, end = (first + offset for offset in header[name]["data_offsets"])
            self._views[name] = self._bytes[begin:end].view(t.dtype).view(t.shape)

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Say whether these tensors have the names, shapes and types of the file's."""
        return tensors.keys() == self._views.keys() and all(
            t.shape == self._views[name].shape and t.dtype == self._views[name].dtype for name, t in tensors.items()
        )

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors that fit into the file. A GPU may still be copying when this returns."""
        for name, t in tensors.items():
            self._views[name].copy_(t, non_blocking=True)

    def data(self) -> memoryview:
        """Return the bytes of the file, without copying them."""
        return self._bytes.numpy().data
