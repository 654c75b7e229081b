"""Whole splits for scoring, batch by batch, in their own order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from experts.augmentation.augment import prepare_eval
from experts.batches import Replica, share
from experts.data.config import DatasetConfig
from experts.data.images import FileImages, ImageStore
from experts.data.prefetch import Prefetcher, Request

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
        """Yield images [B, 3, S, S] and labels int64 [B], on the device.

        Raises:
            ValueError: an image file is missing or damaged; names it.
        """
        firsts = range(self.start, self.stop, self.batch_size)
        parts = [np.arange(first, min(first + self.batch_size, self.stop)) for first in firsts]

        prefetcher = None
        if isinstance(self.store, FileImages):
            prefetcher = Prefetcher(self.store, self.config.loader_processes, pin_memory=self.device.type == "cuda")
            pixels = prefetcher.read_all([Request(part) for part in parts])
        else:
            pixels = map(self.store.take, parts)
        try:
            for part, images in zip(parts, pixels, strict=True):
                labels = torch.from_numpy(self.store.labels[part]).to(self.device)
                yield prepare_eval(images.to(self.device, non_blocking=True), self.config, self.dtype), labels
        finally:
            if prefetcher is not None:
                prefetcher.close()
