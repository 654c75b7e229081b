"""A data set as a reader returns it, before anything is selected or decoded: labelled arrays, or labelled files."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from experts.data.remarks import Remark


@dataclass(frozen=True)
class ArrayPool:
    """Images in memory.

    Attributes:
        images: uint8 [N, channels, H, W], channels 1 or 3.
        labels: int64 [N].
    """

    images: np.ndarray
    labels: np.ndarray

    def take(self, positions: np.ndarray) -> ArrayPool:
        """Return the images at these positions, in this order."""
        return ArrayPool(self.images[positions], self.labels[positions])


@dataclass(frozen=True)
class FilePool:
    """Images in files, not opened yet.

    Attributes:
        root: folder that the paths are relative to.
        paths: N relative paths, as the file system's bytes (a quarter of the memory of text).
        labels: int64 [N].
    """

    root: str
    paths: np.ndarray
    labels: np.ndarray

    def take(self, positions: np.ndarray) -> FilePool:
        """Return the files at these positions, in this order."""
        return FilePool(self.root, self.paths[positions], self.labels[positions])

    def path(self, position: int) -> str:
        """Return the path of the image at a position."""
        return os.path.join(self.root, os.fsdecode(self.paths[position]))


Pool = ArrayPool | FilePool


@dataclass(frozen=True)
class RawDataset:
    """A full data set as published: its classes and its splits; None where a split is missing.

    Attributes:
        remarks: what was skipped or looks wrong while the set was read.
    """

    class_names: tuple[str, ...]
    train: Pool
    val: Pool | None = None
    test: Pool | None = None
    remarks: tuple[Remark, ...] = ()
