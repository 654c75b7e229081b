"""Classes and images per class that a run will have, as far as they can be known without decoding an image."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.imbalance import long_tailed_counts
from experts.data.pools import ArrayPool, RawDataset
from experts.data.readers import open_raw
from experts.data.remarks import Remark
from experts.data.splits import choose_splits
from orchestration.config.run_config import RunConfig

_DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
_TRAINING_IMAGES = {"digits": _DIGITS, "fashion_mnist": (6000,) * 10, "cifar10": (5000,) * 10, "cifar100": (500,) * 100}
_TEST_IMAGES = 10_000  # of each known set that has a test set
FILES = ("image_folder", "image_list")


class ExpectedData(NamedTuple):
    """Facts known about a run's data.

    Attributes:
        num_classes: None if only the data can say.
        counts_C: training images per class, int64 [C]; None if only the data can say.
        remarks: what is cut, held out, skipped or looks wrong.
        test_images: None if only the data can say.
    """

    num_classes: int | None
    counts_C: np.ndarray | None
    remarks: tuple[Remark, ...] = ()
    test_images: int | None = None


def expected_data(config: RunConfig) -> ExpectedData:
    """Return what is known of a run's data: of a known set, or of files that lie on this machine.

    Raises:
        ValueError: the set has fewer images than the config asks for, or another number of classes.
    """
    data = config.dataset
    available = _TRAINING_IMAGES.get(data.source)
    if available is not None:
        if data.num_classes not in (None, len(available)):
            raise ValueError(
                f"dataset.num_classes = {data.num_classes}: {data.source} has {len(available)} classes; "
                f"set dataset.num_classes={len(available)} or null"
            )
        return _selected(data, _known(data, available))
    if (raw := listed(data)) is not None:
        return _selected(data, raw)
    ratio, largest, classes = data.imbalance_ratio, data.max_per_class, data.num_classes
    if ratio is None or largest is None or classes is None or data.val_per_class or data.balanced:
        return ExpectedData(classes, None)
    return ExpectedData(classes, long_tailed_counts(classes, largest, ratio, data.imbalance_type))


def _known(data: DatasetConfig, available: tuple[int, ...]) -> RawDataset:
    """Return the labels of a set of known size, without its images."""
    labels = np.repeat(np.arange(len(available)), available)
    none = np.empty((0,), dtype=np.uint8)
    test = None if data.source == "digits" else _Labels(none, np.zeros(_TEST_IMAGES, dtype=np.int64))
    # The selection looks at labels alone, as it does when the images are there.
    return RawDataset(tuple(map(str, range(len(available)))), _Labels(none, labels), test=test)


class _Labels(ArrayPool):
    """A pool without images."""

    def take(self, positions: np.ndarray) -> ArrayPool:
        return _Labels(self.images, self.labels[positions])


def _selected(data: DatasetConfig, raw: RawDataset) -> ExpectedData:
    chosen = choose_splits(data, raw)
    counts_C = np.bincount(chosen.train.labels, minlength=len(raw.class_names))
    return ExpectedData(len(counts_C), counts_C, (*raw.remarks, *chosen.remarks), len(chosen.test.labels))


def listed(data: DatasetConfig) -> RawDataset | None:
    """Return the files of a set as it lists them; None for sets of arrays, and where they cannot be read here."""
    if data.source not in FILES or data.root is None or not os.path.isdir(os.path.expanduser(data.root)):
        return None
    try:
        return _listed(data)
    except ValueError:  # `plan` lists it among what is missing, `doctor` among its findings
        return None


@functools.lru_cache(maxsize=4)
def _listed(data: DatasetConfig) -> RawDataset:
    return open_raw(data)


def forget() -> None:
    """List files again when they are asked for next: a plan asks often, and a command begins with a new look."""
    _listed.cache_clear()
