"""Images of no known class, which are scored beside a test set: a folder, or a text file of paths."""

from __future__ import annotations

import os

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.files import EXTENSIONS, images_below
from experts.data.images import FileImages
from experts.data.lists import read_paths
from experts.data.pools import FilePool


def open_unknown(path: str, config: DatasetConfig) -> FileImages:
    """Find images of no known class; they are decoded on demand, as the data set's evaluation reads its files.

    Args:
        path: a folder, whose images at any depth are taken in the order of their names; or a text file with a path per
            line, below dataset.root or, without one, below its own folder. It is read as training lists are, of any
            form; a label after the path is not looked at.
        config: of the data set that the model was trained on.

    Raises:
        ValueError: there is no such folder or file, it holds no image, or the first image of the list is not there.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        root, paths = path, np.array([os.fsencode(name) for name in images_below(path)])
        if not len(paths):
            raise ValueError(
                f"{path}: holds no image of no known class; needed files that end in {', '.join(EXTENSIONS[:4])} ..."
            )
    elif os.path.isfile(path):
        root = os.path.expanduser(config.root) if config.root else os.path.dirname(os.path.abspath(path))
        paths = read_paths(root, path)
    else:
        raise ValueError(f"{path}: no such folder or file; needed images of no known class, or a text file of paths")
    pool = FilePool(root, paths, np.zeros(len(paths), dtype=np.int64))
    return FileImages(pool, config.image_size, config.eval.resize)
