"""Image files in a folder per class. Nothing is decoded here."""

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
        found = images_below(os.path.join(base, name))
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


def images_below(folder: str) -> list[str]:
    """Return the paths of the images below a folder, relative to it, sorted."""
    found = []
    for where, _, files in os.walk(folder):
        found += [
            os.path.relpath(os.path.join(where, f), folder)
            for f in files
            if f.lower().endswith(EXTENSIONS) and not f.startswith(".")
        ]
    return sorted(found)
