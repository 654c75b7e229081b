"""The images of a split, as batches are made of them: in memory (resident) or in files.

Both kinds return square uint8 images of image_size; augmentation treats them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from experts.data.census import Census
from experts.data.cpus import usable_cpus
from experts.data.decode import UnreadableImage, decode, decode_file, frame, read_file, resized_crop
from experts.data.pools import ArrayPool, FilePool
from experts.data.transfer import to_device


@dataclass(frozen=True)
class ResidentImages:
    """A split in memory, on the device that trains once `to` has moved it.

    Attributes:
        images: uint8 [N, channels, S, S], channels 1 or 3.
        labels: int64 [N], always in main memory, because samplers read them.
    """

    images: Tensor
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> ResidentImages:
        """Return the same split with its images on a device; itself where they are there already."""
        moved = self.images.to(device)
        return self if moved is self.images else ResidentImages(moved, self.labels)

    def counts(self, num_classes: int) -> np.ndarray:
        """Return the number of images per class, int64 [C]."""
        return np.bincount(self.labels, minlength=num_classes)

    def take(self, positions: np.ndarray) -> Tensor:
        """Return the images at these positions, uint8 [B, channels, S, S], on the images' device."""
        return self.images.index_select(0, to_device(positions, self.images.device))


Crops = tuple[tuple[float, float], np.ndarray]
"""Least and greatest share of the area, and a row of `decode.CROP_UNIFORMS` uniform numbers for each image."""


@dataclass(frozen=True)
class FileImages:
    """A split in files, each decoded again whenever its image is asked for.

    Attributes:
        files: paths and labels.
        image_size: S, pixels.
        resize: short side before the centre crop, pixels; None follows the small-image rule (`decode.frame`).
    """

    files: FilePool
    image_size: int
    resize: int | None = None

    @property
    def labels(self) -> np.ndarray:
        """Return the class ids, int64 [N]."""
        return self.files.labels

    def __len__(self) -> int:
        return len(self.files.labels)

    def to(self, device: torch.device | str) -> FileImages:
        """Return itself: files have no device, and batches go there after decoding."""
        del device
        return self

    def counts(self, num_classes: int) -> np.ndarray:
        """Return the number of images per class, int64 [C]."""
        return np.bincount(self.labels, minlength=num_classes)

    def read(self, positions: np.ndarray, crops: Sequence[Crops | None] = (None,)) -> Tensor:
        """Return the images at these positions, each decoded once.

        Args:
            crops: of every image; None is its frame, with nothing random.

        Returns:
            uint8 [V B, 3, S, S] on the CPU, V the number of crops: the first of all images, then the second.

        Raises:
            UnreadableImage: an image is missing or damaged; names its file.
        """
        size = self.image_size
        out = torch.empty(len(crops), len(positions), 3, size, size, dtype=torch.uint8)
        for row, position in enumerate(positions.tolist()):
            image = decode_file(self.files.path(position))
            for number, crop in enumerate(crops):
                if crop is None:
                    out[number, row] = frame(image, size, self.resize)
                else:
                    out[number, row] = resized_crop(image, size, crop[0], crop[1][row])
        return out.flatten(0, 1)


ImageStore = ResidentImages | FileImages


def part_of_store(store: ImageStore, positions: np.ndarray, labels: np.ndarray | None = None) -> ImageStore:
    """Return the images at these positions, in their order, as a split of its own.

    Args:
        store: the whole split.
        positions: int64 [N].
        labels: class ids of the part; None for those that the images have.
    """
    labels = store.labels[positions] if labels is None else labels
    if isinstance(store, FileImages):
        return replace(store, files=replace(store.files.take(positions), labels=labels))
    return ResidentImages(store.images[to_device(positions, store.images.device)], labels)


def resident_from_array(pool: ArrayPool, image_size: int, short_side: int | None = None) -> ResidentImages:
    """Return an array of images at image_size (`decode.frame`)."""
    # In pieces, because resizing takes working memory in proportion to the images given.
    pieces = [
        frame(torch.from_numpy(piece.copy()), image_size, short_side)
        for piece in np.array_split(pool.images, -(-len(pool.images) // 4096))
    ]
    return ResidentImages(torch.cat(pieces), pool.labels)


def decode_all(
    files: FileImages,
    out: Tensor | None = None,
    *,
    count_all: bool = False,
    beat: Callable[[], None] = lambda: None,
    census: Census | None = None,
) -> dict[int, UnreadableImage]:
    """Decode every file once, on one thread per usable CPU; decoding a JPEG releases Python's global lock.

    Args:
        out: uint8 [N, 3, S, S], filled with the images; None only checks that they can be read.
        count_all: go on after the first one that cannot be read.
        beat: called after every file, from any of the threads.
        census: notes what each file is like.

    Returns:
        The errors of unreadable images, by position, ascending; their rows of `out` are undefined.
    """

    def decode_piece(positions: np.ndarray) -> dict[int, UnreadableImage]:
        unreadable = {}
        for position in positions.tolist():
            try:
                path = files.files.path(position)
                data = read_file(path)
                image = decode(path, data)
                if census is not None:
                    census.note(position, data, image)
                if out is not None:
                    out[position] = frame(image, files.image_size, files.resize)
            except UnreadableImage as problem:
                unreadable[position] = problem
                if not count_all:
                    break
            beat()
        return unreadable

    found: dict[int, UnreadableImage] = {}
    pieces = np.array_split(np.arange(len(files)), -(-len(files) // 256))
    with ThreadPoolExecutor(max_workers=usable_cpus()) as threads:
        # In the order of the pieces, so that the first error found is the first in the set, whichever thread is faster.
        for done in [threads.submit(decode_piece, piece) for piece in pieces]:
            found |= done.result()
            if found and not count_all:
                threads.shutdown(cancel_futures=True)
                break
    return found
