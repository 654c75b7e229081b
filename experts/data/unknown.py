"""Images of no known class, which are scored beside a test set: a folder, or a text file of paths."""

from __future__ import annotations

import os

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.files import EXTENSIONS, images_below
from experts.data.images import FileImages
from experts.data.pools import FilePool


def open_unknown(path: str, config: DatasetConfig) -> FileImages:
    """Find images of no known class; they are decoded on demand, as the data set's evaluation reads its files.

    Args:
        path: a folder, whose images at any depth are taken in the order of their names; or a text file with a path per
            line, below dataset.root or, without one, below its own folder. A label after the path, as published lists
            have it, is not read.
        config: of the data set that the model was trained on.

    Raises:
        ValueError: there is no such folder or file, it holds no image, or the first image of the list is not there.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        root, found = path, images_below(path)
        if not found:
            raise ValueError(
                f"{path}: holds no image of no known class; needed files that end in {', '.join(EXTENSIONS[:4])} ..."
            )
    elif os.path.isfile(path):
        root = os.path.expanduser(config.root) if config.root else os.path.dirname(os.path.abspath(path))
        found = _listed(path, root)
    else:
        raise ValueError(f"{path}: no such folder or file; needed images of no known class, or a text file of paths")
    paths = np.array([os.fsencode(name) for name in found])
    pool = FilePool(root, paths, np.zeros(len(found), dtype=np.int64))
    return FileImages(pool, config.image_size, config.eval.resize)


def _listed(path: str, root: str) -> list[str]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no path; needed one image of no known class per line")

    def name_of(line: str) -> str:
        image, _, label = line.rpartition(" ")
        return image.strip() if image and label.lstrip("-").isdecimal() else line

    # The first image alone: a wrong root fails for all of them.
    first = os.path.join(root, name_of(lines[0]))
    if not os.path.isfile(first):
        raise ValueError(
            f"{path}: its first image is not at {first}; set dataset.root to the folder that its paths are relative to"
        )
    return [name_of(line) for line in lines]
