"""Decoding beside training: batches of files read by loader processes, in order, the same whoever reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from experts.data.decode import CROP_UNIFORMS
from experts.data.images import FileImages
from experts.data.keyed_random import uniforms


class Request(NamedTuple):
    """Images to read: positions in the store, and where their crop draws are."""

    positions: np.ndarray
    crop_key: int = 0
    first_draw: int = 0


def read(store: FileImages, request: Request) -> Tensor:
    """Decode what is asked for, uint8 [B, 3, S, S]; crops depend on the request alone.

    Raises:
        ValueError: an image is missing or damaged; names its file.
    """
    crops = None
    if store.crop_scale is not None:
        crops = uniforms(request.crop_key, request.first_draw, len(request.positions), CROP_UNIFORMS)
    return store.read(request.positions, crops)


class _Reader(Dataset):
    """Runs in a loader process. An error comes back as its message, which the asking side raises without the trace
    of another process."""

    def __init__(self, store: FileImages) -> None:
        self.store = store

    def __getitem__(self, request: Any) -> Tensor | str:
        try:
            return read(self.store, request)
        except ValueError as error:
            return str(error)


class _Requests(Sampler):
    """The requests of one pass, changed between passes so that the processes can stay."""

    def __init__(self) -> None:
        self.of_this_pass: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.of_this_pass)


def _as_it_is(item: Any) -> Any:
    return item


class Stream:
    """Reads requests in order, ahead of need where there are loader processes."""

    def __init__(self, store: FileImages, processes: int, *, pin_memory: bool = False) -> None:
        """Start nothing yet.

        Args:
            processes: that decode; 0 decodes when asked, in this process.
            pin_memory: put batches in page-locked memory, for a GPU to fetch.
        """
        self.store = store
        self.processes = processes
        self.pin_memory = pin_memory
        self._requests = _Requests()
        self._loader: DataLoader | None = None

    def read_all(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """Yield the images of each request, uint8 [B, 3, S, S]. May be left early and called again.

        Raises:
            ValueError: an image is missing or damaged; names its file.
        """
        if not self.processes:
            for request in requests:
                images = read(self.store, request)
                yield images.pin_memory() if self.pin_memory else images
            return
        self._requests.of_this_pass = requests
        if self._loader is None:
            self._loader = DataLoader(
                _Reader(self.store),
                batch_size=None,
                sampler=self._requests,
                num_workers=self.processes,
                collate_fn=_as_it_is,
                persistent_workers=True,
                pin_memory=self.pin_memory,
                generator=torch.Generator().manual_seed(0),  # without one it would advance torch's global generator
            )
        batches = iter(self._loader)
        for _ in requests:
            item = next(batches)
            if isinstance(item, str):
                del batches  # else the error's traceback keeps the processes alive
                self.close()
                raise ValueError(item)
            yield item

    def close(self) -> None:
        """End the loader processes."""
        self._loader = None
