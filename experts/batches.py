"""Batches as a pure function of (seed, stage, epoch, step, stream).

An epoch is one global sequence of draws from the sampler. Step s takes its rows [s B, (s + 1) B), and replica d of D
takes the d-th contiguous part of those. Every random choice for an image is keyed by (seed, stage, epoch, stream, view)
and by the image's row in the epoch. So resuming needs no state, an image drawn twice in an epoch gets two crops, and
neither the number of replicas nor that of loader processes changes a pixel.

    draws     = sampler.draw(epoch)                     # positions of the epoch's images, on every replica alike
    rows      = this replica's part of step s           # with mixup the whole step: partners come from all of it
    raw       = pixels at draws[rows]                   # from the device, or decoded from files ahead of time
    images    = augment(raw, uniforms(key, rows))       # on the device, each image by the draws of its row
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts.augmentation.augment import NUM_UNIFORMS, augment, random_resized_crops
from experts.data.config import DatasetConfig
from experts.data.decode import CROP_UNIFORMS
from experts.data.images import FileImages, ImageStore, ResidentImages
from experts.data.keyed_random import KeyedRandom, key, permutation, uniforms
from experts.data.prefetch import Prefetcher, Request, read
from experts.progress import Progress


@dataclass(frozen=True)
class Mixed:
    """How the images of a batch were blended with others of the same batch (mixup).

    Attributes:
        share: weight of the image itself, in [0, 1]; its partner has the rest.
        labels_B, global_labels: as in `Batch`, of the partners.
    """

    share: float
    labels_B: Tensor
    global_labels: Tensor


@dataclass(frozen=True)
class Batch:
    """One replica's part of a step.

    Attributes:
        images_B3HW: float; B is 0 where the global batch has fewer images than there are replicas.
        labels_B: int64, of these images.
        global_labels: int64, of the whole batch, in its order. Every replica has them, so each computes the
            denominators of the global batch without asking the others.
        positions_B: rows of the training set, int64.
        partner: a second batch of as many images, paired with this one by row, where the stage has one.
        mixed: how the images were blended, where the stage does so.
        first_row: row in the epoch of the replica's first image; the others follow.
        features: inputs of the heads of the experts held here, one [B, D] each, in place of images, which then have no
            pixels; None where the stage runs trunk and features on the images.
    """

    images_B3HW: Tensor
    labels_B: Tensor
    global_labels: Tensor
    positions_B: Tensor | None = None
    partner: Batch | None = None
    mixed: Mixed | None = None
    features: tuple[Tensor, ...] | None = None
    first_row: int = 0


def share(count: int, part: int, parts: int) -> tuple[int, int]:
    """Return the bounds of one of `parts` contiguous shares of `count` items.

    Shares differ by at most one item; the longer ones come first, as in np.array_split.
    """
    each, longer = divmod(count, parts)
    start = part * each + min(part, longer)
    return start, start + each + (part < longer)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Contents of a stream of training batches; the same on every machine.

    Attributes:
        seed: of the run.
        stage, stream: names; experts with equal seed, stage and stream see the same pixels.
        epochs: of the stage; samplers may depend on it.
        batch_size: images of the global batch; the last one of an epoch may be smaller, unless dropped.
        drop_last: leave out the last batch of an epoch where it is smaller.
        view: another value augments the same images differently.
        mixup_alpha: blend every image with another of the global batch, the share of the first one drawn per batch
            from Beta(alpha, alpha); None blends nothing.
    """

    seed: int
    stage: str
    stream: str
    epochs: int
    batch_size: int
    drop_last: bool = False
    view: int = 0
    mixup_alpha: float | None = None


@dataclass(frozen=True)
class Replica:
    """The data replica that batches are made for, and the device and type of its images.

    Attributes:
        index: d, from 0.
        count: D, the replicas that share every batch.
        device: where the images go.
        dtype: of the images.
    """

    index: int = 0
    count: int = 1
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


class TrainBatches:
    """The training batches of one stage and stream, for one replica.

    With mixup every replica makes the pixels of the whole batch, because partners come from all of it.
    """

    def __init__(
        self,
        store: ImageStore,
        sampler: Any,
        dataset_config: DatasetConfig,
        config: StreamConfig,
        replica: Replica = Replica(),
    ) -> None:
        """Move a store that is in memory to the device; loader processes start with the first batch.

        Args:
            sampler: a built piece of kind "sampler", over the store's labels.

        Raises:
            ValueError: the epoch has no whole batch and partial ones are dropped.
        """
        self.config = config
        self.replica = replica
        self.dataset_config = dataset_config
        self.store = store.to(replica.device)
        self.sampler = sampler
        self.device = torch.device(replica.device)
        draws = sampler.draws_per_epoch
        self.draws_per_epoch = draws - draws % config.batch_size if config.drop_last else draws
        if not self.draws_per_epoch:
            raise ValueError(
                f"batch_size = {config.batch_size} with drop_last: an epoch has {draws} images, no whole "
                f"batch; lower batch_size"
            )
        self.steps_per_epoch = -(-self.draws_per_epoch // config.batch_size)  # rounded up
        self._cached: tuple[int, np.ndarray] | None = None  # the draws of the current epoch, which every step reads
        self._prefetcher: Prefetcher | None = None
        if isinstance(self.store, FileImages):
            self._prefetcher = Prefetcher(
                self.store, dataset_config.loader_processes, pin_memory=self.device.type == "cuda"
            )

    def positions(self, epoch: int) -> np.ndarray:
        """Return the epoch's global sequence of positions in the store, int64 [draws_per_epoch]; epochs start at 1."""
        if self._cached is None or self._cached[0] != epoch:
            # Step 0 whatever the step: an epoch is drawn as a whole, so a sampler may depend on the epoch alone.
            progress = Progress(epoch, self.config.epochs, 0, self.steps_per_epoch)
            self._cached = epoch, self.sampler.draw(progress, self._key(epoch, "draws"))[: self.draws_per_epoch]
        return self._cached[1]

    def labels(self, epoch: int, step: int) -> np.ndarray:
        """Return the labels of the whole batch, int64 [global B], without touching pixels; steps start at 0."""
        first, last = self._rows(step)
        return self.store.labels[self.positions(epoch)[first:last]]

    def batch(self, epoch: int, step: int) -> Batch:
        """Return this replica's part of one batch, decoding in this process.

        Raises:
            ValueError: an image file is missing or damaged; names it.
        """
        request = self._request(epoch, step)
        images = read(self.store, request) if isinstance(self.store, FileImages) else self._take(self.store, request)
        return self._finish(images, epoch, step)

    def iterate(self, epoch: int, first_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps first_step .. stop_step - 1; loader processes decode files ahead of them.

        Args:
            stop_step: None goes on to the end of the epoch.

        Raises:
            ValueError: an image file is missing or damaged; names it.
        """
        steps = range(first_step, self.steps_per_epoch if stop_step is None else stop_step)
        if self._prefetcher is None:
            yield from (self.batch(epoch, step) for step in steps)
            return
        requests = [self._request(epoch, step) for step in steps]
        for step, images in zip(steps, self._prefetcher.read_all(requests), strict=True):
            yield self._finish(images, epoch, step)

    def of_features(self, features: Sequence[Tensor], epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the rest of an epoch's batches with features in place of pixels, which are neither read nor augmented.

        Args:
            features: [N, D] of every image in the store, one tensor for each expert held here.
            epoch, first_step: as `iterate`.
        """
        for step in range(first_step, self.steps_per_epoch):
            labels_B, global_labels, positions_B = self._labels_and_positions(epoch, step)
            images_B3HW = torch.empty(len(labels_B), 3, 0, 0, device=self.device, dtype=self.replica.dtype)
            own = tuple(features_ND[positions_B] for features_ND in features)
            row = self._local_rows(step)[0]
            yield Batch(images_B3HW, labels_B, global_labels, positions_B, features=own, first_row=row)

    def close(self) -> None:
        """Stop the loader processes, if there are any."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _key(self, epoch: int, what: str) -> int:
        return key(self.config.seed, self.config.stage, epoch, self.config.stream, what)

    def _rows(self, step: int) -> tuple[int, int]:
        assert 0 <= step < self.steps_per_epoch, (step, self.steps_per_epoch)
        return step * self.config.batch_size, min((step + 1) * self.config.batch_size, self.draws_per_epoch)

    def _local_rows(self, step: int) -> tuple[int, int]:
        first, last = self._rows(step)
        start, stop = share(last - first, self.replica.index, self.replica.count)
        return first + start, first + stop

    def _local_places(self, step: int) -> tuple[int, int]:
        """Return the same rows counted from the start of the step; all other rows count from the start of the epoch."""
        first, last = self._local_rows(step)
        return first - step * self.config.batch_size, last - step * self.config.batch_size

    def _pixel_rows(self, step: int) -> tuple[int, int]:
        """Return the rows whose pixels this replica makes; with mixup those of the whole step (see above)."""
        return self._local_rows(step) if self.config.mixup_alpha is None else self._rows(step)

    def _request(self, epoch: int, step: int) -> Request:
        first, last = self._pixel_rows(step)
        return Request(self.positions(epoch)[first:last], self._key(epoch, f"crop/{self.config.view}"), first)

    def _take(self, store: ResidentImages, request: Request) -> Tensor:
        images = store.take(request.positions)
        scale = self.dataset_config.augment.random_resized_crop
        if scale is None:
            return images
        draws = uniforms(request.crop_key, request.first_draw, len(request.positions), CROP_UNIFORMS)
        return random_resized_crops(images, draws, scale)

    def _finish(self, raw: Tensor, epoch: int, step: int) -> Batch:
        first, last = self._pixel_rows(step)
        draws = uniforms(self._key(epoch, f"pixels/{self.config.view}"), first, last - first, NUM_UNIFORMS)
        images = augment(raw.to(self.device, non_blocking=True), draws, self.dataset_config, self.replica.dtype)
        own_labels, labels, positions = self._labels_and_positions(epoch, step)
        mixed = None
        if self.config.mixup_alpha is not None:
            # Share and order have keys without the replica, so all replicas blend the same pairs.
            share_ = self._mixup_share(epoch, step)
            order = torch.from_numpy(permutation(self._key(epoch, f"mixup order/{step}"), len(labels))).to(self.device)
            start, stop = self._local_places(step)
            images = share_ * images[start:stop] + (1 - share_) * images[order[start:stop]]
            mixed = Mixed(share_, labels[order[start:stop]], labels[order])
        return Batch(images, own_labels, labels, positions, mixed=mixed, first_row=self._local_rows(step)[0])

    def _labels_and_positions(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the labels of this replica's images and of the whole batch, and the rows of this replica's images."""
        labels = torch.from_numpy(self.labels(epoch, step)).to(self.device)
        positions = torch.from_numpy(self.positions(epoch)[slice(*self._local_rows(step))]).to(self.device)
        return labels[slice(*self._local_places(step))], labels, positions

    def _mixup_share(self, epoch: int, step: int) -> float:
        assert self.config.mixup_alpha is not None
        source = KeyedRandom(self._key(epoch, f"mixup share/{step}"))
        return source.betavariate(self.config.mixup_alpha, self.config.mixup_alpha)
