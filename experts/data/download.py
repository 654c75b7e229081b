"""Where a downloadable set lives, and how it is fetched once although many workers ask for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from experts.data.config import DatasetConfig


def require_root(config: DatasetConfig, holds: str) -> str:
    """Return the folder of a set's files: dataset.root, or a cache folder where it is to be downloaded.

    Raises:
        ValueError: no root is set, or it is not a folder; the message says what it should hold.
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


def missing_root(config: DatasetConfig) -> str | None:
    """Say that the folder of a set's files is not here; None if it is, or if the set needs none. Opens no file."""
    if config.source == "digits":
        return None
    try:
        require_root(config, "the folder of its files")
    except ValueError as problem:
        return str(problem)
    return None


@contextlib.contextmanager
def download_lock(root: str) -> Iterator[None]:
    """Hold the lock of a download folder, which is made if missing; other processes on this machine wait for it.

    Raises:
        ValueError: the download inside fails: there is no network, or a file is not the published one.
    """
    try:
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, ".download.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it however the process ends
            yield
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"dataset.download = true: could not fetch into {root} ({error}); check the network and the "
            f"folder, or copy the files and set dataset.root to their folder"
        ) from error
