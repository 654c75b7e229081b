"""CIFAR-10 and CIFAR-100 from their published files, in the order of torchvision.

The pickles of the python layout are read as data; what they name is never run (pickles.py).

Source: Krizhevsky 2009. Both layouts hold the same images in the same order: `python` (cifar-10-batches-py,
cifar-100-python) and `binary` (cifar-10-batches-bin, cifar-100-binary).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.download import download_lock, require_root
from experts.data.pickles import read_pickled_fields
from experts.data.pools import ArrayPool, RawDataset

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Names of files and fields of one of the two sets."""

    python_folder: str
    binary_folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    meta: str
    names: str
    num_classes: int
    label_bytes: int

    @property
    def binary_names_file(self) -> str:
        return "batches.meta.txt" if self.num_classes == 10 else "fine_label_names.txt"


LAYOUTS = {
    "cifar10": Layout(
        python_folder="cifar-10-batches-py",
        binary_folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        labels="labels",
        meta="batches.meta",
        names="label_names",
        num_classes=10,
        label_bytes=1,
    ),
    "cifar100": Layout(
        python_folder="cifar-100-python",
        binary_folder="cifar-100-binary",
        train=("train",),
        test=("test",),
        labels="fine_labels",
        meta="meta",
        names="fine_label_names",
        num_classes=100,
        label_bytes=2,
    ),
}


def open_cifar(config: DatasetConfig) -> RawDataset:
    """Read CIFAR-10 or -100 from root, which is or holds the unpacked folder of either layout.

    With download=true, missing files are fetched and all files are checked against the md5 sums that torchvision lists.
    """
    layout = LAYOUTS[config.source]
    root = require_root(config, f"the folder that holds {layout.python_folder} or {layout.binary_folder}")
    if config.download:
        _fetch(config.source, root)
    # Root may be the folder itself or the one above it. Where both layouts are there, either gives the same images.
    for folder in (os.path.join(root, layout.python_folder), root):
        if os.path.isfile(os.path.join(folder, layout.train[0])):
            train, test = (_python_split(folder, files, layout) for files in (layout.train, layout.test))
            return RawDataset(_python_names(folder, layout), train, test=test)
    for folder in (os.path.join(root, layout.binary_folder), root):
        if os.path.isfile(os.path.join(folder, f"{layout.train[0]}.bin")):
            train, test = (_binary_split(folder, files, layout) for files in (layout.train, layout.test))
            return RawDataset(_binary_names(folder, layout), train, test=test)
    packed = [f for f in sorted(os.listdir(root)) if f.startswith("cifar-") and f.endswith(".tar.gz")]
    found = f"only {packed[0]}, still packed" if packed else "neither"
    raise ValueError(
        f"dataset.root = {root}: found {found}; needed {layout.python_folder}/{layout.train[0]} or "
        f"{layout.binary_folder}/{layout.train[0]}.bin; unpack the published archive there, or set "
        f"dataset.download=true"
    )


def _fetch(source: str, root: str) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    published: Any = {"cifar10": CIFAR10, "cifar100": CIFAR100}[source]
    folder = os.path.join(root, published.base_folder)
    files = [*published.train_list, *published.test_list, [published.meta["filename"], published.meta["md5"]]]
    with download_lock(root):
        if not all(check_integrity(os.path.join(folder, name), md5) for name, md5 in files):
            download_and_extract_archive(published.url, root, filename=published.filename, md5=published.tgz_md5)
        for name, md5 in files:
            if not check_integrity(os.path.join(folder, name), md5):
                raise RuntimeError(f"{os.path.join(folder, name)} does not have the published md5 {md5}")


def _python_split(folder: str, files: tuple[str, ...], layout: Layout) -> ArrayPool:
    images, labels = [], []
    for name in files:
        path = _require_file(folder, name)
        fields = read_pickled_fields(path)
        data, ids = fields.get("data"), fields.get(layout.labels)
        if not isinstance(data, np.ndarray) or data.shape[1:] != (PIXELS,) or not isinstance(ids, list):
            raise ValueError(
                f"{path}: found the fields {sorted(fields)}; needed 'data', bytes [N, {PIXELS}], and "
                f"'{layout.labels}'; is this the other CIFAR? check dataset.root"
            )
        images.append(data)
        labels.append(_class_ids(path, ids, len(data), layout))
    return ArrayPool(np.concatenate(images).reshape(-1, *SHAPE), np.concatenate(labels))


def _binary_split(folder: str, files: tuple[str, ...], layout: Layout) -> ArrayPool:
    images, labels = [], []
    row = layout.label_bytes + PIXELS
    for name in files:
        path = _require_file(folder, f"{name}.bin")
        raw = np.fromfile(path, dtype=np.uint8)
        if not raw.size or raw.size % row:
            raise ValueError(
                f"{path}: {raw.size} bytes, needed a multiple of {row} ({layout.label_bytes} of labels "
                f"and {PIXELS} of pixels per image); fetch the file again"
            )
        rows = raw.reshape(-1, row)
        images.append(rows[:, layout.label_bytes :])
        ids = rows[:, layout.label_bytes - 1].tolist()  # CIFAR-100 has two bytes per image: coarse, fine
        labels.append(_class_ids(path, ids, len(rows), layout))
    return ArrayPool(np.concatenate(images).reshape(-1, *SHAPE), np.concatenate(labels))


def _require_file(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: missing, though its companions are there; unpack the published archive again")
    return path


def _class_ids(path: str, labels: list[Any], num_images: int, layout: Layout) -> np.ndarray:
    if len(labels) != num_images:
        raise ValueError(f"{path}: {num_images} images but {len(labels)} labels; fetch the file again")
    for image, label in enumerate(labels):
        # The file may hold anything, so nothing of it goes into the message but a short whole number or a type.
        if type(label) is not int or not 0 <= label < layout.num_classes:
            found = label if type(label) is int and label.bit_length() < 64 else f"({type(label).__name__})"
            raise ValueError(
                f"{path}: label {found} of image {image} is out of range; needed 0 to "
                f"{layout.num_classes - 1}; fetch the file again"
            )
    return np.array(labels, dtype=np.int64)


def _python_names(folder: str, layout: Layout) -> tuple[str, ...]:
    path = os.path.join(folder, layout.meta)
    if not os.path.isfile(path):
        return _numbers(layout)
    fields = read_pickled_fields(path)
    names = fields.get(layout.names)
    texts = [name for name in names if isinstance(name, str | bytes)] if isinstance(names, list) else []
    if len(texts) != layout.num_classes:
        raise ValueError(
            f"{path}: found the fields {sorted(fields)} with {len(texts)} class names; needed '{layout.names}', "
            f"{layout.num_classes} texts; fetch the file again"
        )
    return tuple(name.decode("latin-1") if isinstance(name, bytes) else name for name in texts)


def _binary_names(folder: str, layout: Layout) -> tuple[str, ...]:
    path = os.path.join(folder, layout.binary_names_file)
    if not os.path.isfile(path):
        return _numbers(layout)
    with open(path, encoding="latin-1") as file:
        names = tuple(file.read().split())
    if len(names) != layout.num_classes:
        raise ValueError(f"{path}: found {len(names)} class names, needed {layout.num_classes}")
    return names


def _numbers(layout: Layout) -> tuple[str, ...]:
    return tuple(str(c) for c in range(layout.num_classes))
