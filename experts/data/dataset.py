"""From a config to the images of each split.

raw set        every image as published, nothing decoded                    readers.open_raw
splits         which images are trained, validated and tested on            splits.choose_splits
quarantine     unreadable training images are left out, if allowed          images.decode_all
stores         squares of pixels in memory, or files decoded on demand      images.ImageStore
remarks        what was cut, is there twice or looks wrong                  remarks.Remark
digest         a hash of the selection; a resumed run must have the same
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from experts.data.census import Census
from experts.data.config import DatasetConfig
from experts.data.decode import UnreadableImage
from experts.data.fingerprints import Fingerprint, of_contents, of_states
from experts.data.images import (
    FileImages,
    ImageStore,
    ResidentImages,
    decode_all,
    part_of_store,
    resident_from_array,
)
from experts.data.pools import ArrayPool, FilePool, Pool
from experts.data.readers import open_raw
from experts.data.remarks import Remark, named, shown
from experts.data.repeats import repeated_contents
from experts.data.splits import choose_splits

MIB = 2**20
_SHOWN = 3  # files in a message


@dataclass(frozen=True)
class LeftOut:
    """An unreadable training image that is left out of training (dataset.quarantine).

    Attributes:
        path: relative to dataset.root.
        label: class id.
        reason: what is wrong with the file.
    """

    path: str
    label: int
    reason: str


@dataclass(frozen=True)
class Dataset:
    """A data set, ready for batches.

    Attributes:
        config: the config that it was opened with.
        class_names: C names.
        counts_C: training images per class, int64 [C], each at least 1.
        train, val, test: stores; val is None where there is no validation set.
        digest: sha256 of the selection: pixels and labels of arrays; paths and labels of files, since hashing pixels
            would mean reading every file.
        raw_image_shape: (height, width, channels) of the published images; None if they differ, or are not all decoded.
        left_out: unreadable training images. They are in no count, store or digest.
        remarks: what else became of the images that were found.
        contents: fingerprints of the splits that were decoded, by name in words.
    """

    config: DatasetConfig
    class_names: tuple[str, ...]
    counts_C: np.ndarray
    train: ImageStore
    val: ImageStore | None
    test: ImageStore
    digest: str
    raw_image_shape: tuple[int, int, int] | None
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[Remark, ...] = ()
    contents: Mapping[str, Fingerprint] = field(default_factory=dict)

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return fingerprints of the splits that are files: by content where they were decoded.

        Those that are read again while training have sizes and times as well: a later start may not decode them.
        """
        states = self._states
        splits = [*states, *(split for split in self.contents if split not in states)]
        return {split: {**states.get(split, {}), **self.contents.get(split, {})} for split in splits}

    @functools.cached_property
    def _states(self) -> dict[str, Fingerprint]:
        """Sizes and times of files that are read while training, asked for once: there may be millions."""
        stores = {"training": self.train, "validation": self.val, "test": self.test}
        return {split: of_states(store.files) for split, store in stores.items() if isinstance(store, FileImages)}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def only(self, classes: np.ndarray) -> Dataset:
        """Return the part that belongs to some classes, which are renumbered from 0 in the given order.

        Raises:
            ValueError: the training, validation or test set has no image of these classes.
        """
        new_ids = np.full(self.num_classes, -1)
        new_ids[classes] = np.arange(len(classes))
        return replace(
            self,
            class_names=tuple(self.class_names[c] for c in classes),
            counts_C=self.counts_C[classes],
            train=_subset(self.train, new_ids),
            val=None if self.val is None else _subset(self.val, new_ids),
            test=_subset(self.test, new_ids),
        )

    def train_as_evaluated(self) -> ImageStore:
        """Return the training images as evaluation reads them, with nothing random."""
        if isinstance(self.train, FileImages):
            return replace(self.train, resize=self.config.eval.resize)
        return self.train


def _subset(store: ImageStore, new_ids: np.ndarray) -> ImageStore:
    kept = np.flatnonzero(new_ids[store.labels] >= 0)
    if not len(kept):
        raise ValueError(
            f"none of {len(store.labels)} images is of the {int((new_ids >= 0).sum())} classes that the stage is for; "
            f"needed one or more in the training, validation and test sets each"
        )
    return part_of_store(store, kept, new_ids[store.labels[kept]])


def open_dataset(
    config: DatasetConfig, *, left_out: Sequence[str] | None = None, beat: Callable[[], None] = lambda: None
) -> Dataset:
    """Open a data set, by the steps at the head of this file.

    Args:
        left_out: paths (`LeftOut.path`) of training images that were unreadable when the run began. Exactly these are
            left out and no file is checked, so that a resumed run has the same images even if a file was repaired.
            None checks every file, if dataset.quarantine allows any to be left out.
        beat: called after every file that is decoded here, from any thread.

    Raises:
        ValueError: missing or damaged files, too few images of a class, or keys that do not fit together. Names the
            file or key, what was found, what was needed and what to do.
    """
    raw = open_raw(config)
    train, val, test, remarks = choose_splits(config, raw)

    find_unreadable = config.quarantine > 0 and left_out is None
    # A resumed run leaves out what it left out at its start, before anything is decoded.
    train = _without(train, left_out or ())
    decoding = _Decoding(config, find_unreadable, beat)
    train_store, missing = decoding.train_store(train)
    if missing:
        train = train.take(np.setdiff1d(np.arange(len(train.labels)), list(missing)))

    return Dataset(
        config,
        raw.class_names,
        _counts_left(raw.class_names, train, missing),
        train_store,
        None if val is None else decoding.eval_store(val, "validation"),
        decoding.eval_store(test, "test"),
        _digest(raw.class_names, train, val, test),
        _raw_shape((train, val, test), decoding.seen),
        tuple(missing.values()),
        (*raw.remarks, *remarks, *_remarks(decoding.seen)),
        {split: of_contents(census.contents) for split, (_, census) in decoding.seen.items()},
    )


def _remarks(seen: Mapping[str, tuple[FilePool, Census]]) -> Iterator[Remark]:
    """Yield what the files of those splits that were decoded tell."""
    pools = {split: pool for split, (pool, _) in seen.items()}
    yield from repeated_contents(pools, {split: census.contents for split, (_, census) in seen.items()})
    for split, (pool, census) in seen.items():
        yield from census.remarks(split, pool)


def _counts_left(class_names: tuple[str, ...], train: Pool, missing: dict[int, LeftOut]) -> np.ndarray:
    counts_C = np.bincount(train.labels, minlength=len(class_names))
    for c in np.flatnonzero(counts_C == 0).tolist():
        first = next((item for item in missing.values() if item.label == c), None)
        why = f"; the first is {shown(first.path)}, {first.reason}" if first else ""
        raise ValueError(
            f"dataset.quarantine: none of the training images of {named(class_names, c)} can be read{why}; "
            f"needed at least 1; restore them"
        )
    return counts_C


class _Decoding:
    """Turns the files of splits into stores, and notes what was decoded on the way.

    Attributes:
        seen: files and census of each split that was decoded, by its name in words.
    """

    def __init__(self, config: DatasetConfig, find_unreadable: bool, beat: Callable[[], None]) -> None:
        self.config, self.find_unreadable, self.beat = config, find_unreadable, beat
        self.seen: dict[str, tuple[FilePool, Census]] = {}

    def train_store(self, pool: Pool) -> tuple[ImageStore, dict[int, LeftOut]]:
        """Return the training images, and by position in the pool those that had to be left out.

        Raises:
            ValueError: more images are unreadable than dataset.quarantine allows.
        """
        config = self.config
        if isinstance(pool, ArrayPool):
            return resident_from_array(pool, config.image_size), {}
        # Random crops of the whole picture need the file in every epoch. Resident images are cropped from their frame.
        streamed = config.augment.crop_scale is not None and config.resident != "always"
        files = FileImages(pool, config.image_size)
        images = None if streamed else _memory_for(config, files)
        if images is None and not self.find_unreadable:
            return files, {}
        census = Census(len(files))
        problems = decode_all(files, images, count_all=self.find_unreadable, beat=self.beat, census=census)
        if problems and not self.find_unreadable:
            raise next(iter(problems.values()))
        if len(problems) > config.quarantine:
            _refuse_quarantine(config, pool, problems)

        missing = {
            i: LeftOut(os.fsdecode(pool.paths[i]), int(pool.labels[i]), problem.reason)
            for i, problem in problems.items()
        }
        kept = np.setdiff1d(np.arange(len(files)), list(missing))
        if missing:
            pool, census = pool.take(kept), census.take(kept)
        self.seen["training"] = pool, census
        if images is not None:
            return ResidentImages(images[torch.from_numpy(kept)] if missing else images, pool.labels), missing
        return replace(files, files=pool), missing

    def eval_store(self, pool: Pool, split: str) -> ImageStore:
        """Return all validation or test images.

        Raises:
            UnreadableImage: an image cannot be read. Files that are decoded on demand are checked here only where the
                training files are checked too.
        """
        config = self.config
        if isinstance(pool, ArrayPool):
            return resident_from_array(pool, config.image_size, config.eval.resize)
        files = FileImages(pool, config.image_size, config.eval.resize)
        images = _memory_for(config, files)
        if images is not None or self.find_unreadable:
            census = Census(len(files))
            for problem in decode_all(files, images, beat=self.beat, census=census).values():
                remedy = f"restore it: no {split} image is left out, dataset.quarantine is for training images alone"
                raise UnreadableImage(problem.path, problem.reason, remedy)
            self.seen[split] = pool, census
        return files if images is None else ResidentImages(images, pool.labels)


def _refuse_quarantine(config: DatasetConfig, pool: FilePool, problems: dict[int, UnreadableImage]) -> None:
    first = ", ".join(f"{shown(problem.path)} ({problem.reason})" for problem in list(problems.values())[:_SHOWN])
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ValueError(
        f"dataset.quarantine = {config.quarantine}: {len(problems)} of {len(pool.labels)} training images cannot be "
        f"read: {first}{more}; restore them, or set dataset.quarantine={len(problems)} to train without them"
    )


def _memory_for(config: DatasetConfig, files: FileImages) -> torch.Tensor | None:
    """Return an empty tensor for all images, or None where files are decoded on demand.

    dataset.resident decides; with auto, a split is kept in memory if dataset.resident_mib has room for it.
    """
    fits = len(files) * 3 * config.image_size**2 / MIB <= config.resident_mib
    if config.resident == "always" or (config.resident == "auto" and fits):
        return torch.empty(len(files), 3, config.image_size, config.image_size, dtype=torch.uint8)
    return None


def selection_digest(config: DatasetConfig, left_out: Sequence[str] = ()) -> str:
    """Return the digest that a data set would have, without decoding an image.

    Args:
        left_out: as in `open_dataset`.

    Raises:
        ValueError: files are missing, or keys do not fit together.
    """
    raw = open_raw(config)
    train, val, test, _ = choose_splits(config, raw)
    return _digest(raw.class_names, _without(train, left_out), val, test)


def _without(pool: Pool, left_out: Sequence[str]) -> Pool:
    """Return a pool less some files."""
    if not left_out or not isinstance(pool, FilePool):
        return pool
    return pool.take(np.flatnonzero(~np.isin(pool.paths, [os.fsencode(path) for path in left_out])))


def _digest(class_names: tuple[str, ...], *pools: Pool | None) -> str:
    # Runs record this hash and compare it when they resume: any change here makes them refuse to go on.
    digest = hashlib.sha256("\n".join(class_names).encode("utf-8", "surrogateescape"))
    for pool in pools:
        if pool is None:
            digest.update(b"none")
            continue
        digest.update(str(len(pool.labels)).encode())
        digest.update(pool.labels.tobytes())
        if isinstance(pool, ArrayPool):
            digest.update(np.ascontiguousarray(pool.images).data)
        else:
            digest.update(b"\n".join(pool.paths.tolist()))
    return digest.hexdigest()


def _raw_shape(
    pools: Sequence[Pool | None], seen: Mapping[str, tuple[FilePool, Census]]
) -> tuple[int, int, int] | None:
    train = pools[0]
    if isinstance(train, ArrayPool):
        channels, height, width = train.images.shape[1:]
        return height, width, channels
    # One image of another size in a hundred thousand is enough: of files that are not decoded here, nobody knows.
    if len(seen) < sum(pool is not None for pool in pools):
        return None
    shapes = {shape for _, census in seen.values() for shape in census.shapes}
    if len(shapes) > 1:
        return None
    channels, height, width = shapes.pop()
    return height, width, channels
