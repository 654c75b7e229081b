"""Image files: a folder per class, or text files of `path label` lines. Nothing is decoded here."""

from __future__ import annotations

import os

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.download import require_root
from experts.data.pools import FilePool, RawDataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def open_image_folder(config: DatasetConfig) -> RawDataset:
    """List a tree with one folder per class. Classes and files are sorted by name.

    With root/train, the folders beside it are the other splits: root/test is the test set and root/val the validation
    set; without root/test, root/val is the test set. Without root/train, root itself holds the class folders, and
    dataset.test_per_class images of each class are held out as the test set.
    """
    root = require_root(config, "a folder with train/<class>/<image> and test/<class>/<image>, or with <class>/<image>")
    splits = [s for s in ("train", "val", "test") if os.path.isdir(os.path.join(root, s))]
    if "train" not in splits:
        if splits:
            raise ValueError(
                f"dataset.root = {root}: found {'/ and '.join(splits)}/ but no train/; needed train/ "
                f"beside them, or class folders only"
            )
        names, pool = _scan(root, "", None)
        return RawDataset(names, pool)
    names, train = _scan(root, "train", None)
    others = {s: _scan(root, s, names)[1] for s in splits[1:]}
    if "test" not in others and "val" in others:  # as in ImageNet, whose test labels are not public
        others["test"] = others.pop("val")
    return RawDataset(names, train, others.get("val"), others.get("test"))


def _scan(root: str, split: str, expected: tuple[str, ...] | None) -> tuple[tuple[str, ...], FilePool]:
    base = os.path.join(root, split) if split else root
    names = tuple(sorted(e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith(".")))
    if not names:
        raise ValueError(
            f"{base}: found no class folder; needed one folder per class with its images; check dataset.root = {root}"
        )
    if expected is not None and names != expected:
        extra, missing = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
        wrong = "; ".join(
            [f"{name} is not in train/ ({len(extra)} such)" for name in extra[:1]]
            + [f"{name} is missing ({len(missing)} such)" for name in missing[:1]]
        )
        raise ValueError(f"{base}: its class folders differ from those of train/: {wrong}; give both the same")
    paths: list[str] = []
    labels: list[int] = []
    for c, name in enumerate(names):
        found = _images_below(os.path.join(base, name))
        if not found:
            raise ValueError(
                f"{os.path.join(base, name)}: class '{name}' has no image; needed at least one file that "
                f"ends in {', '.join(EXTENSIONS[:4])} ...; add images or remove the folder"
            )
        paths += [os.path.join(split, name, f) for f in found]
        labels += [c] * len(found)
    return names, _pool(root, paths, labels)


def _pool(root: str, paths: list[str], labels: list[int]) -> FilePool:
    # Bytes, not text: a name that is not UTF-8 survives, and millions of paths take a quarter of the memory.
    return FilePool(root, np.array([os.fsencode(p) for p in paths]), np.array(labels, dtype=np.int64))


def _images_below(folder: str) -> list[str]:
    found = []
    for where, _, files in os.walk(folder):
        found += [
            os.path.relpath(os.path.join(where, f), folder)
            for f in files
            if f.lower().endswith(EXTENSIONS) and not f.startswith(".")
        ]
    return sorted(found)


def open_image_list(config: DatasetConfig) -> RawDataset:
    """List the images of text files of `relative/path label` lines, as published for ImageNet-LT and Places-LT.

    A class is named after the folder of its images if every class has a folder of its own, else by its number.
    """
    root = require_root(config, "the folder that the paths in dataset.train_list are relative to")
    pools: dict[str, FilePool | None] = {}
    for key in ("train_list", "val_list", "test_list"):
        value = getattr(config, key)
        pools[key] = None if value is None else _read_list(root, key, value, config.num_classes)
    train = pools["train_list"]
    assert train is not None  # DatasetConfig refuses source=image_list without it
    num_classes = config.num_classes or int(train.labels.max()) + 1
    for key, pool in pools.items():
        if pool is not None and pool.labels.max() >= num_classes:
            raise ValueError(
                f"dataset.{key} = {getattr(config, key)}: label {pool.labels.max()} is not in "
                f"dataset.train_list, whose labels end at {num_classes - 1}; use lists of one set"
            )
    return RawDataset(_class_names(train, num_classes), train, pools["val_list"], pools["test_list"])


def _read_list(root: str, key: str, value: str, num_classes: int | None) -> FilePool:
    """Read and check one list.

    Raises:
        ValueError: there is no such file or no line in it, a line is not a path and a whole number, a label is out of
            range, or the first image is not below root; names file and line.
    """
    places = [os.path.expanduser(value), os.path.join(root, value)]
    path = next((p for p in places if os.path.isfile(p)), None)
    if path is None:
        raise ValueError(
            f"dataset.{key} = {value}: no such file, here or in dataset.root = {root}; needed a text file "
            f"of `path label` lines"
        )
    paths: list[str] = []
    labels: list[int] = []
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            image, _, label = line.rstrip().rpartition(" ")  # from the right: a path may contain spaces
            if not image or not label.isdecimal():
                raise ValueError(
                    f"{path}:{number}: found '{line.strip()[:80]}'; needed `path label`, the label a "
                    f"whole number from 0"
                )
            if num_classes is not None and int(label) >= num_classes:
                raise ValueError(
                    f"{path}:{number}: label {label} is out of range; needed 0 to {num_classes - 1} "
                    f"(dataset.num_classes = {num_classes})"
                )
            paths.append(image.strip())
            labels.append(int(label))
    if not paths:
        raise ValueError(f"{path}: holds no image; needed at least one `path label` line (dataset.{key})")

    # The first image alone: a wrong root fails for all of them, and looking for each would take minutes on a network.
    first = os.path.join(root, paths[0])
    if not os.path.isfile(first):
        raise ValueError(
            f"{path}: its first image is not at {first}; set dataset.root to the folder that its paths are relative to"
        )
    return _pool(root, paths, labels)


def _class_names(pool: FilePool, num_classes: int) -> tuple[str, ...]:
    folders: dict[int, str] = {}
    for path, label in zip(pool.paths.tolist(), pool.labels.tolist(), strict=True):
        folder = os.path.dirname(os.fsdecode(path))
        if folders.setdefault(label, folder) != folder:
            return tuple(str(c) for c in range(num_classes))

    # Two folders of the same name in different places would give two classes one name; then numbers are clearer.
    names = [os.path.basename(folders.get(c, "")) for c in range(num_classes)]
    if len(set(names)) == num_classes and all(names):
        return tuple(names)
    return tuple(str(c) for c in range(num_classes))
