"""Where a downloadable set lives, and fetching it once although many workers ask."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from experts.data.config import DatasetConfig


def needs_root(config: DatasetConfig, holds: str) -> str:
    """The folder of a set's files: dataset.root, or a cache folder of its own where it is to be downloaded.

    Raises:
        ValueError: no root is set, or it is no folder; says what it should hold.
    """
    if config.root is None and config.download:
        return str(Path.home() / ".cache" / "expertail" / config.source)
    offer = ", or dataset.download=true" if config.source in ("fashion_mnist", "cifar10", "cifar100") else ""
    if config.root is None:
        raise ValueError(f"dataset.root is not set (dataset {config.name}); set it to {holds}{offer}")
    root = os.path.expanduser(config.root)
    if not os.path.isdir(root) and not config.download:
        found = "a file" if os.path.exists(root) else "nothing"
        raise ValueError(
            f"dataset.root = {config.root}: found {found} at {os.path.abspath(root)}; needed {holds}{offer}"
        )
    return root


@contextlib.contextmanager
def locked_root(root: str) -> Iterator[None]:
    """Hold the only permission to download into a folder, made if missing; others on this machine wait.

    Raises:
        ValueError: what is inside fails for lack of a network, or for a file that is not the published one.
    """
    try:
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, ".download.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"dataset.download = true: could not fetch into {root} ({error}); check the network and the "
            f"folder, or copy the files and set dataset.root to their folder"
        ) from error
