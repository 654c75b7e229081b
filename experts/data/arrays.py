"""Readers of data sets that are stored as arrays: scikit-learn's digits and Fashion-MNIST's IDX files."""

from __future__ import annotations

import gzip
import importlib.util
import os
import struct
import zlib

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.download import download_lock, require_root
from experts.data.pools import ArrayPool, RawDataset

FASHION_CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FASHION_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
IDX_UNSIGNED_BYTE = 0x08


def open_digits(config: DatasetConfig) -> RawDataset:
    """Return the 1,797 handwritten digits that scikit-learn ships: 8x8, one channel, values 0..16 scaled to 0..255.

    There is no test set: dataset.test_per_class images of each class are held out (`imbalance.hold_out`).
    """
    table = _digits_table()
    images = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return RawDataset(tuple(str(d) for d in range(10)), ArrayPool(images, table[:, -1].astype(np.int64)))


def _digits_table() -> np.ndarray:
    """Read scikit-learn's table, 64 pixels and a label per row, from its file: importing scikit-learn takes 2 s."""
    package = importlib.util.find_spec("sklearn")
    for place in (package.submodule_search_locations or ()) if package else ():
        path = os.path.join(place, "datasets", "data", "digits.csv.gz")
        if os.path.exists(path):
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # a release that keeps the file elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def open_fashion_mnist(config: DatasetConfig) -> RawDataset:
    """Read Fashion-MNIST from its four IDX files, packed (.gz) or unpacked, in root or root/FashionMNIST/raw.

    Source: Xiao et al. 2017, arXiv:1708.07747.
    """
    root = require_root(config, "a folder with train-images-idx3-ubyte.gz and its three companions")
    if config.download and not all(_places(root, name) for name in FASHION_FILES):
        import torchvision

        with download_lock(root):
            torchvision.datasets.FashionMNIST(root, download=True)
    train, test = (
        ArrayPool(_images(root, f"{part}-images-idx3-ubyte"), _labels(root, f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    )
    for part, pool in (("train", train), ("t10k", test)):
        if len(pool.images) != len(pool.labels):
            raise ValueError(
                f"dataset.root = {root}: {part} has {len(pool.images)} images but {len(pool.labels)} "
                f"labels; copy all four files from one source"
            )
    return RawDataset(FASHION_CLASSES, train, test=test)


def _images(root: str, name: str) -> np.ndarray:
    return read_idx(_find(root, name), num_axes=3)[:, None]


def _labels(root: str, name: str) -> np.ndarray:
    path = _find(root, name)
    labels = read_idx(path, num_axes=1).astype(np.int64)
    for image in np.flatnonzero(labels >= len(FASHION_CLASSES)):
        raise ValueError(
            f"{path}: label {labels[image]} of image {image} is out of range; needed 0 to "
            f"{len(FASHION_CLASSES) - 1}; fetch the file again"
        )
    return labels


def _places(root: str, name: str) -> list[str]:
    """Return the places where a file is, unpacked or packed, the preferred one first."""
    folders = (root, os.path.join(root, "FashionMNIST", "raw"), os.path.join(root, "raw"))
    paths = [os.path.join(folder, name + ending) for folder in folders for ending in ("", ".gz")]
    return [path for path in paths if os.path.isfile(path)]


def _find(root: str, name: str) -> str:
    places = _places(root, name)
    if places:
        return places[0]
    raise ValueError(
        f"dataset.root = {root}: found no {name}.gz or {name}, there or in FashionMNIST/raw; needed: the "
        f"four files of Fashion-MNIST; copy them there, or set dataset.download=true"
    )


def read_idx(path: str, num_axes: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, packed with gzip if its name ends in .gz.

    Returns:
        uint8, with `num_axes` axes.

    Raises:
        ValueError: the file is truncated, corrupt, or of another kind; names the file.
    """
    remedy = "fetch the file again"
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    header = 4 + 4 * num_axes
    magic = IDX_UNSIGNED_BYTE << 8 | num_axes  # two zero bytes, the type of a value, the number of axes
    if len(data) < header or struct.unpack(">I", data[:4])[0] != magic:
        raise ValueError(
            f"{path}: begins with {data[:4].hex() or 'nothing'}, an IDX file of {num_axes} axes of bytes "
            f"begins with {magic:08x}; {remedy}"
        )
    shape = struct.unpack(f">{num_axes}I", data[4:header])
    needed = header + int(np.prod(shape, dtype=np.int64))
    if len(data) != needed:
        raise ValueError(f"{path}: {len(data)} bytes unpacked, its header {shape} needs {needed}; {remedy}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
