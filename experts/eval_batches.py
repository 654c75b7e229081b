"""Whole splits for scoring, batch by batch, in their own order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from experts.augmentation.stack import prepare_eval
from experts.batches import Replica, share
from experts.data.config import DatasetConfig
from experts.data.images import ImageStore, ResidentImages
from experts.data.prefetch import Prefetcher, Request
from experts.data.transfer import to_device

_ALONE = Replica()


class EvalBatches:
    """One replica's contiguous share of a test or validation set, in the set's own order, as (images, labels)."""

    def __init__(
        self,
        store: ImageStore,
        config: DatasetConfig,
        batch_size: int,
        replica: Replica = _ALONE,
    ) -> None:
        """Copy nothing yet: images go to the device a batch at a time, unless the store is there already."""
        self.store = store
        self.config = config
        self.batch_size = batch_size
        self.device = torch.device(replica.device)
        self.dtype = replica.dtype
        self.start, self.stop = share(len(store.labels), replica.index, replica.count)

    def __len__(self) -> int:
        """Return the number of batches."""
        return (self.stop - self.start + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, 3, S, S] and labels int64 [B], on the device; the host does not wait for it.

        Raises:
            ValueError: an image file is missing or damaged; names it.
        """
        firsts = range(self.start, self.stop, self.batch_size)
        parts = [slice(first, min(first + self.batch_size, self.stop)) for first in firsts]
        if isinstance(self.store, ResidentImages):
            for part in parts:
                yield self._prepared(self.store.images[part], part)
            return
        prefetcher = Prefetcher(self.store, self.config.loader_processes, pin_memory=self.device.type == "cuda")
        try:
            requests = [Request(np.arange(part.start, part.stop)) for part in parts]
            for part, images in zip(parts, prefetcher.read_all(requests), strict=True):
                yield self._prepared(images, part)
        finally:
            prefetcher.close()

    def _prepared(self, images_BcHW: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        images_B3HW = prepare_eval(to_device(images_BcHW, self.device), self.config, self.dtype)
        return images_B3HW, to_device(self.store.labels[part], self.device)
