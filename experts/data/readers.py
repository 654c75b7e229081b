"""Read the data set that a config names, whatever its files look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from experts.data.arrays import open_digits, open_fashion_mnist
from experts.data.cifar import open_cifar
from experts.data.config import DatasetConfig
from experts.data.files import open_image_folder
from experts.data.lists import open_image_list
from experts.data.names import readable
from experts.data.pools import RawDataset

READERS: dict[str, Callable[[DatasetConfig], RawDataset]] = {
    "digits": open_digits,
    "fashion_mnist": open_fashion_mnist,
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "image_folder": open_image_folder,
    "image_list": open_image_list,
}


def open_raw(config: DatasetConfig) -> RawDataset:
    """Read the full set, with nothing selected.

    Raises:
        ValueError: files are missing or damaged, labels out of range, a class or the whole set empty.
    """
    raw = READERS[config.source](config)
    if len(raw.class_names) < 2:
        raise ValueError(
            f"dataset.root = {config.root}: found 1 class ('{raw.class_names[0]}'), needed at least 2; "
            f"check that root is not one level too high or too low"
        )
    if config.num_classes not in (None, len(raw.class_names)):
        raise ValueError(
            f"dataset.num_classes = {config.num_classes}: found {len(raw.class_names)} classes in "
            f"{config.root or config.source}; set dataset.num_classes={len(raw.class_names)} or null"
        )
    # Names of folders may hold bytes that no table, picture or server takes.
    return replace(raw, class_names=tuple(map(readable, raw.class_names)))
