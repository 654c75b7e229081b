"""Batches as a pure function of (seed, stage, epoch, step, stream).

An epoch is one global sequence of draws from the sampler. Step s takes its rows [s B, (s + 1) B), and replica d of D
takes the d-th contiguous part of those. Every random choice for an image is keyed by (seed, stage, epoch, stream, view)
and by the image's row in the epoch. So resuming needs no state, an image drawn twice in an epoch gets two crops, and
neither the number of replicas nor that of loader processes changes a pixel.

    draws     = sampler.draw(epoch)                     # positions of the epoch's images, on every replica alike
    labels    = labels of all draws                     # go to the device with the positions, once per epoch
    rows      = this replica's parts of some steps      # whole steps where partners are of the same step
    raw       = pixels at draws[rows]                   # from the device, or decoded from files ahead of time
    images    = stack(raw, uniforms(key, rows))         # augmented on the device, each image by the draws of its row
    views     = other stacks(raw, other draws)          # of the same rows, where the stage has further views
    images    = blend(images, partners)                 # where a mixing says so, see experts/mixing/
    batches   = slices of images and labels             # views; no step copies anything to the device

Files are augmented one step at a time, since they arrive so. Images in memory are augmented ahead on a device that is
not the CPU, as many whole steps at once as fit in AHEAD_BYTES: an epoch of CIFAR-LT takes a few launches in place of a
few per step. On the CPU one step at a time: with 16 at once their pixels leave the cache, and a step takes up to 1.4
times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experts.augmentation.stack import Stack
from experts.data.config import Augment, DatasetConfig
from experts.data.images import FileImages, ImageStore, ResidentImages
from experts.data.keyed_random import key, uniforms
from experts.data.prefetch import CropKey, Prefetcher, Request, read
from experts.data.transfer import to_device
from experts.epoch import Epoch, Stream, draw_mixes, joined, merged
from experts.mixing.mixing import Mixing, Part, Step, mix
from experts.progress import Progress

AHEAD_BYTES = 512 * 2**20  # of augmented pixels


@dataclass(frozen=True)
class HostLabels:
    """The labels of a batch in main memory, for pieces whose shapes follow them.

    Attributes:
        labels_B: int64, of this replica's images.
        global_labels: int64, of the whole batch, in its order.
    """

    labels_B: np.ndarray
    global_labels: np.ndarray


@dataclass(frozen=True)
class Mixed:
    """The second set of labels of a batch whose images were mixed with others.

    Attributes:
        share, rest: weights of the losses of the batch's own labels, in [0, 1], and of these; together 1. Tensors
            without axes, of the images' type and on their device, so that a graph of the step can have other values
            each time.
        labels_B, global_labels, host_labels: as in `Batch`.
    """

    share: Tensor
    rest: Tensor
    labels_B: Tensor
    global_labels: Tensor
    host_labels: HostLabels | None = None


@dataclass(frozen=True)
class Batch:
    """One replica's part of a step.

    Attributes:
        images_B3HW: float; B is 0 where the global batch has fewer images than there are replicas.
        labels_B: int64, of these images; the first of two sets where they are mixed.
        global_labels: int64, of the whole batch, in its order. Every replica has them, so each computes the
            denominators of the global batch without asking the others.
        positions_B: rows of the training set, int64.
        partner: a second batch of as many images, paired with this one by row, where the stage has one.
        mixed: the second set of labels, where the images of the step are mixed.
        first_row: row in the epoch of the replica's first image; the others follow.
        features: inputs of the heads of the experts held here, one [B, D] each, in place of images, which then have no
            pixels; None where the stage runs trunk and features on the images.
        host_labels: the same labels in main memory; see `on_host`.
        views: the same images again, each time with other random changes and draws, [B, 3, H, W] like the first; as
            many as the stage has further views.
        told: by the name of an augmentation, what it has drawn for the first view of the whole batch, int64; see
            `Piece.told`.
    """

    images_B3HW: Tensor
    labels_B: Tensor
    global_labels: Tensor
    positions_B: Tensor | None = None
    partner: Batch | None = None
    mixed: Mixed | None = None
    features: tuple[Tensor, ...] | None = None
    first_row: int = 0
    host_labels: HostLabels | None = None
    views: tuple[Tensor, ...] = ()
    told: Mapping[str, Tensor] = field(default_factory=dict)


def on_host(batch: Batch | Mixed) -> HostLabels:
    """Return a batch's labels in main memory. `TrainBatches` has put them there; otherwise the host waits for them."""
    if batch.host_labels is not None:
        return batch.host_labels
    return HostLabels(batch.labels_B.cpu().numpy(), batch.global_labels.cpu().numpy())


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
    """

    seed: int
    stage: str
    stream: str
    epochs: int
    batch_size: int
    drop_last: bool = False
    view: int = 0


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


class _Pixels(NamedTuple):
    """Pixels to be made: rows of the epoch, of one of its streams, with its positions on the device."""

    stream: Stream
    positions_N: Tensor
    rows: list[slice]


class TrainBatches:
    """The training batches of one stage and stream, for one replica.

    Where partners are images of the same step, every replica makes the pixels of the whole step.
    """

    def __init__(
        self,
        store: ImageStore,
        sampler: Any,
        dataset_config: DatasetConfig,
        config: StreamConfig,
        replica: Replica = Replica(),
        mixing: Mixing | None = None,
        second_sampler: Any = None,
        views: Sequence[Augment] = (),
    ) -> None:
        """Move a store that is in memory to the device; loader processes start with the first batch.

        Args:
            sampler: a built piece of kind "sampler", over the store's labels.
            mixing: of the images; None leaves them as they are.
            second_sampler: a built one like `sampler`, of the stream that the mixing takes partners from, if it does.
            views: augmentations of the further views of every image; none where images are mixed.

        Raises:
            ValueError: the epoch has no whole batch and partial ones are dropped.
        """
        assert mixing is None or not views, "images are mixed, or have further views"
        self.config = config
        self.replica = replica
        self.views = tuple(views)
        self.mixing, self.second_sampler = mixing, second_sampler
        self.dataset_config = dataset_config
        self.store = store.to(replica.device)
        self.device = torch.device(replica.device)
        draws = sampler.draws_per_epoch
        self.draws_per_epoch = draws - draws % config.batch_size if config.drop_last else draws
        if not self.draws_per_epoch:
            raise ValueError(
                f"batch_size = {config.batch_size} with drop_last: an epoch has {draws} images, no whole "
                f"batch; lower batch_size"
            )
        self.steps_per_epoch = -(-self.draws_per_epoch // config.batch_size)  # rounded up
        self._own = Stream(sampler, self._key, self.draws_per_epoch)
        self._second: Stream | None = None
        if second_sampler is not None:
            self._second = Stream(second_sampler, partial(self._key, mixed_in=True), self.draws_per_epoch)
        self._stacks = [Stack.of(dataset_config, augment) for augment in (dataset_config.augment, *self.views)]
        self._frame_of = _frames(self._stacks)
        self.steps_ahead = self._most_ahead()
        self._epoch: Epoch | None = None
        self._prefetcher: Prefetcher | None = None
        if isinstance(self.store, FileImages):
            self._prefetcher = Prefetcher(
                self.store, dataset_config.loader_processes, pin_memory=self.device.type == "cuda"
            )

    def _most_ahead(self) -> int:
        """Return the number of steps to augment at once."""
        if isinstance(self.store, FileImages) or self.device.type == "cpu":
            return 1
        side = self.store.images.shape[-1]
        in_step = images_of_a_step(self.config.batch_size, self.replica.count, alone=self._alone)
        in_step *= len(self._stacks) * (1 if self._second is None else 2)
        return max(1, AHEAD_BYTES // (in_step * 3 * side * side * self.replica.dtype.itemsize))

    @property
    def _alone(self) -> bool:
        """Whether the images of this replica are made without others of the batch, which may be mixed in."""
        return self.mixing is None or self._second is not None

    @property
    def read_at_once(self) -> int:
        """The most images of files that are read at once, each of their crops counted; 0 where none are."""
        if self._prefetcher is None:
            return 0
        images = images_of_a_step(self.config.batch_size, self.replica.count, alone=self._alone)
        return images * crops_of(self._stacks)

    def positions(self, epoch: int) -> np.ndarray:
        """Return the epoch's global sequence of positions in the store, int64 [draws_per_epoch]; epochs start at 1."""
        return self._own.positions(self._start(epoch))

    def labels(self, epoch: int, step: int) -> np.ndarray:
        """Return the labels of a step's images, int64 [global B], without touching pixels; steps start at 0."""
        return self.store.labels[self.positions(epoch)[self._rows(step)]]

    def batch(self, epoch: int, step: int) -> Batch:
        """Return this replica's part of one batch, decoding in this process.

        Raises:
            ValueError: an image file is missing or damaged; names it.
        """
        drawn, steps = self._drawn(epoch), range(step, step + 1)
        wanted = self._wanted(drawn, steps)
        if isinstance(self.store, FileImages):
            raw = [read(self.store, self._request(pixels, drawn)) for pixels in wanted]
        else:
            raw = [_take(self.store, pixels) for pixels in wanted]
        return next(self._finish(raw, wanted, drawn, steps))

    def iterate(self, epoch: int, first_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps first_step .. stop_step - 1, made ahead: see the head of this file.

        Args:
            stop_step: None goes on to the end of the epoch.

        Raises:
            ValueError: an image file is missing or damaged; names it.
        """
        steps = range(first_step, self.steps_per_epoch if stop_step is None else stop_step)
        drawn = self._drawn(epoch)
        if self._prefetcher is None:
            assert isinstance(self.store, ResidentImages)
            for at in range(0, len(steps), self.steps_ahead):
                some = steps[at : at + self.steps_ahead]
                wanted = self._wanted(drawn, some)
                raw = [_take(self.store, pixels) for pixels in wanted]
                yield from self._finish(raw, wanted, drawn, some)
            return
        wanted_in = [self._wanted(drawn, range(step, step + 1)) for step in steps]
        requests = [self._request(pixels, drawn) for wanted in wanted_in for pixels in wanted]
        decoded = self._prefetcher.read_all(requests)
        for step, wanted in zip(steps, wanted_in, strict=True):
            yield from self._finish([next(decoded) for _ in wanted], wanted, drawn, range(step, step + 1))

    def of_features(self, features: Sequence[Tensor], epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the rest of an epoch's batches with features in place of pixels, which are neither read nor augmented.

        Args:
            features: [N, D] of every image in the store, one tensor for each expert held here.
            epoch, first_step: as `iterate`.
        """
        assert self.mixing is None and not self.views, "features are of images as they are"
        drawn = self._drawn(epoch)
        for step in range(first_step, self.steps_per_epoch):
            positions_B = drawn.positions_N[self._own_rows(step)]
            images_B3HW = torch.empty(len(positions_B), 3, 0, 0, device=self.device, dtype=self.replica.dtype)
            own = tuple(features_ND[positions_B] for features_ND in features)
            yield self._batch(images_B3HW, drawn, step, own)

    def close(self) -> None:
        """Stop the loader processes, if there are any."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _key(self, epoch: int, what: str, *, mixed_in: bool = False) -> int:
        words = (self.config.stream, "mixed in") if mixed_in else (self.config.stream,)
        return key(self.config.seed, self.config.stage, epoch, *words, what)

    def _start(self, epoch: int) -> Progress:
        """Return the moment of an epoch's first step. Its draws are made at once, and depend on no other."""
        return Progress(epoch, self.config.epochs, 0, self.steps_per_epoch)

    # Rows of the epoch

    def _rows(self, step: int) -> slice:
        assert 0 <= step < self.steps_per_epoch, (step, self.steps_per_epoch)
        return slice(step * self.config.batch_size, min((step + 1) * self.config.batch_size, self.draws_per_epoch))

    def _own_rows(self, step: int) -> slice:
        rows = self._rows(step)
        start, stop = share(rows.stop - rows.start, self.replica.index, self.replica.count)
        return slice(rows.start + start, rows.start + stop)

    def _made_rows(self, epoch: Epoch, step: int) -> slice:
        """Return the rows whose pixels this replica makes: its own, or those of the step that partners are of."""
        blend = epoch.blend(step)
        return self._own_rows(step) if blend is None or blend.order_B is None else self._rows(step)

    def _drawn(self, number: int) -> Epoch:
        """Return what an epoch draws, on the device; every step reads it."""
        if self._epoch is None or self._epoch.number != number:
            start, second, mixes = self._start(number), None, None
            positions = self.positions(number)
            labels = self.store.labels[positions]
            if self._second is not None:
                second = self._second.positions(start)
            if self.mixing is not None:
                others = None if second is None else self.store.labels[second]
                whole = Step(labels, others, self.dataset_config.image_size, start, partial(self._key, number))
                steps = [self._rows(step) for step in range(self.steps_per_epoch)]
                mixes = draw_mixes(self.mixing, whole, steps, self.device, self.replica.dtype)
                labels = mixes.first
            labels_N, positions_N = to_device(labels, self.device), to_device(positions, self.device)
            second_N = None if second is None else to_device(second, self.device)
            told_N = {name: to_device(told, self.device) for name, told in self._told(number).items()}
            self._epoch = Epoch(number, labels, labels_N, positions_N, second_N, mixes, told_N)
        return self._epoch

    def _told(self, epoch: int) -> dict[str, np.ndarray]:
        """Return what the first view's draws are told as, int64 [N], by augmentation. Every replica needs all rows."""
        all_rows = _Pixels(self._own, torch.empty(0), [slice(0, self.draws_per_epoch)])
        return self._stacks[0].told(partial(self._uniforms, all_rows, epoch, self.config.view))

    # Pixels of consecutive steps, and the batches cut from them

    def _wanted(self, epoch: Epoch, steps: range) -> list[_Pixels]:
        """Return the pixels that consecutive steps need: images, then partners of the mixing's own stream, if any."""
        made = [self._made_rows(epoch, step) for step in steps]
        wanted = [_Pixels(self._own, epoch.positions_N, merged(made))]
        mixed = [step for step in steps if epoch.blend(step) is not None]
        if self._second is not None and mixed:
            assert epoch.second_N is not None
            rows = merged([self._own_rows(step) for step in mixed])
            wanted.append(_Pixels(self._second, epoch.second_N, rows))
        return wanted

    def _request(self, pixels: _Pixels, epoch: Epoch) -> Request:
        """Return what to read for some pixels: one frame for all views that do not begin with a crop of their own."""
        (rows,) = pixels.rows
        crops: list[CropKey | None] = []
        for number, stack in enumerate(self._stacks):
            name = pixels.stream.key_of(epoch.number, f"crop/{self.config.view + number}")
            crops.append(stack.crop_scale and CropKey(stack.crop_scale, name))
        positions = pixels.stream.positions(self._start(epoch.number))[rows]
        return Request(positions, tuple(dict.fromkeys(crops)), rows.start)

    def _finish(self, raw: Sequence[Tensor], wanted: list[_Pixels], epoch: Epoch, steps: range) -> Iterator[Batch]:
        """Augment and mix the images of consecutive steps at once, and return their batches."""
        made = [
            self._augmented(to_device(values, self.device), pixels, epoch)
            for values, pixels in zip(raw, wanted, strict=True)
        ]
        (images, *views), *second = made
        if self.mixing is not None:
            images = self._mix(images, [others for others, *_ in second], epoch, steps)
        return self._cut((images, *views), epoch, steps)

    def _augmented(self, values: Tensor, pixels: _Pixels, epoch: Epoch) -> list[Tensor]:
        """Return all views of some images, each by its own stack and draws."""
        cropped = isinstance(self.store, FileImages)
        frames = values.chunk(1 + max(self._frame_of)) if cropped and len(values) else [values]
        found = []
        for number, stack in enumerate(self._stacks):
            draws = stack.draw(partial(self._uniforms, pixels, epoch.number, self.config.view + number))
            images = frames[self._frame_of[number] if len(frames) > 1 else 0]
            found.append(stack(images, draws, self.replica.dtype, cropped=cropped))
        return found

    def _uniforms(self, pixels: _Pixels, epoch: int, view: int, table: str, width: int) -> np.ndarray:
        name = pixels.stream.key_of(epoch, f"{table}/{view}")
        return np.concatenate([uniforms(name, part.start, part.stop - part.start, width) for part in pixels.rows])

    def _mix(self, images: Tensor, second: Sequence[Tensor], epoch: Epoch, steps: range) -> Tensor:
        """Return this replica's images of the steps, mixed where they are to be; what is given is written to."""
        own, others, mixed, first, done = [], [], [], 0, 0  # `first` counts the rows made, `done` those returned
        for step in steps:
            blend, made, mine = epoch.blend(step), self._made_rows(epoch, step), self._own_rows(step)
            start, count = first + mine.start - made.start, mine.stop - mine.start
            own.append(slice(start, start + count))
            if blend is not None:
                mixed.append(Part(blend, slice(done, done + count)))
                if blend.order_B is not None:
                    others.append(first + blend.order_B[mine.start - made.start :][:count])
            first, done = first + made.stop - made.start, done + count
        if not mixed:
            return joined(images, merged(own))
        partners = second[0] if second else images.index_select(0, to_device(np.concatenate(others), self.device))
        return mix(joined(images, merged(own)), partners, mixed)

    def _cut(self, made: Sequence[Tensor], epoch: Epoch, steps: range) -> Iterator[Batch]:
        first = 0
        for step in steps:
            rows = self._own_rows(step)
            last = first + rows.stop - rows.start
            images, *views = (view[first:last] for view in made)
            yield self._batch(images, epoch, step, views=tuple(views))
            first = last

    def _batch(
        self,
        images: Tensor,
        epoch: Epoch,
        step: int,
        features: tuple[Tensor, ...] | None = None,
        views: tuple[Tensor, ...] = (),
    ) -> Batch:
        rows, own = self._rows(step), self._own_rows(step)
        mixed, mixes = None, epoch.mixes
        if mixes is not None and mixes.blends[step] is not None:
            host = HostLabels(mixes.host_labels[own], mixes.host_labels[rows])
            mixed = Mixed(mixes.share_T[step], mixes.rest_T[step], mixes.labels_N[own], mixes.labels_N[rows], host)
        return Batch(
            images,
            epoch.labels_N[own],
            epoch.labels_N[rows],
            epoch.positions_N[own],
            mixed=mixed,
            features=features,
            first_row=own.start,
            host_labels=HostLabels(epoch.host_labels[own], epoch.host_labels[rows]),
            views=views,
            told={name: told_N[rows] for name, told_N in epoch.told_N.items()},
        )


def images_of_a_step(batch_size: int, replicas: int, *, alone: bool) -> int:
    """Return the most images that a replica makes for a step: its share, or all where any may be mixed in."""
    return -(-batch_size // replicas) if alone else batch_size


def crops_of(stacks: Sequence[Stack]) -> int:
    """Return the number of frames that are read from a file for all views of its image."""
    return 1 + max(_frames(stacks))


def _frames(stacks: Sequence[Stack]) -> list[int]:
    """Return which of the frames read from a file each view is made of; those with a crop of their own share none."""
    names = [-1 if stack.crop_scale is None else number for number, stack in enumerate(stacks)]
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names]


def _take(store: ResidentImages, pixels: _Pixels) -> Tensor:
    return store.images.index_select(0, joined(pixels.positions_N, pixels.rows))
