"""Decoding ahead of training: loader processes read the files of coming batches, and batches arrive in order.

Which process reads a batch changes nothing: a request carries the positions of its images and where their random crops
are drawn, so no process keeps a generator.
"""

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


class CropKey(NamedTuple):
    """A random crop of images: least and greatest share of the area, and the stream that its draws are from."""

    scale: tuple[float, float]
    key: int


class Request(NamedTuple):
    """Images to read: their positions in the store, crops to make of each, and the row that their draws begin at.

    A crop of None is the image's frame.
    """

    positions: np.ndarray
    crops: tuple[CropKey | None, ...] = (None,)
    first_draw: int = 0


def read(store: FileImages, request: Request) -> Tensor:
    """Return the images of a request, decoded, uint8 [V B, 3, S, S]; crops depend on the request alone.

    Raises:
        ValueError: an image is missing or damaged; names its file.
    """
    first, count = request.first_draw, len(request.positions)
    crops = [crop and (crop.scale, uniforms(crop.key, first, count, CROP_UNIFORMS)) for crop in request.crops]
    return store.read(request.positions, crops)


class _Reader(Dataset):
    """Reads requests in a loader process.

    An error comes back as its message. The training process raises it, so the operator sees one line instead of a
    traceback of another process.
    """

    def __init__(self, store: FileImages) -> None:
        self.store = store

    def __getitem__(self, request: Any) -> Tensor | str:
        try:
            return read(self.store, request)
        except ValueError as error:
            return str(error)


class _Requests(Sampler):
    """The requests of one pass. They are replaced between passes, so that the loader processes can stay."""

    def __init__(self) -> None:
        self.pass_requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pass_requests)


def _unchanged(item: Any) -> Any:
    """Collate nothing: a request is already a batch."""
    return item


class Prefetcher:
    """Reads requests in order, and ahead of time where there are loader processes."""

    def __init__(self, store: FileImages, processes: int, *, pin_memory: bool = False) -> None:
        """Start nothing yet.

        Args:
            processes: loader processes; with 0, this process decodes a request when it is asked for.
            pin_memory: put batches in page-locked memory, from which a GPU can copy while it computes.
        """
        self.store = store
        self.processes = processes
        self.pin_memory = pin_memory
        self._requests = _Requests()
        self._loader: DataLoader | None = None

    def read_all(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """Yield the images of each request, as `read`. A caller may stop early and call again.

        Raises:
            ValueError: an image is missing or damaged; names its file.
        """
        if not self.processes:
            for request in requests:
                images = read(self.store, request)
                yield images.pin_memory() if self.pin_memory else images
            return
        self._requests.pass_requests = requests
        if self._loader is None:
            self._loader = DataLoader(
                _Reader(self.store),
                batch_size=None,
                sampler=self._requests,
                num_workers=self.processes,
                collate_fn=_unchanged,
                persistent_workers=True,
                pin_memory=self.pin_memory,
                generator=torch.Generator().manual_seed(0),  # else it advances torch's global generator
            )
        batches = iter(self._loader)
        for _ in requests:
            item = next(batches)
            if isinstance(item, str):
                del batches  # the traceback of the error would keep the processes alive
                self.close()
                raise ValueError(item)
            yield item

    def close(self) -> None:
        """Stop the loader processes."""
        self._loader = None
