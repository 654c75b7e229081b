"""Fingerprints of a split's files, compared when a run goes on: by what they hold, else by sizes and times."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experts.data.cpus import usable_cpus
from experts.data.pools import FilePool

Fingerprint = Mapping[str, str]
"""Digests of a split's files: "contents", or "sizes" and "times" where the files are not read."""

_THREADS = 16  # each waits for one answer of a file system, which may be a network away


def of_contents(contents: np.ndarray) -> dict[str, str]:
    """Return the fingerprint of files that were all read, from their hashes, bytes [N]."""
    return {"contents": _digest(contents.tolist())}


def of_states(pool: FilePool) -> dict[str, str]:
    """Return the fingerprint of files that are not read at the start. A missing one counts as empty."""
    with ThreadPoolExecutor(_THREADS) as threads:
        pieces = np.array_split(np.arange(len(pool.labels)), _THREADS)
        found = [state for states in threads.map(lambda piece: _states(pool, piece), pieces) for state in states]
    return {
        "sizes": _digest(str(size).encode() for size, _ in found),
        "times": _digest(str(time).encode() for _, time in found),
    }


def _states(pool: FilePool, positions: np.ndarray) -> list[tuple[int, int]]:
    states = []
    root = os.fsencode(pool.root)
    for path in pool.paths[positions].tolist():
        try:
            found = os.stat(os.path.join(root, path))
            states.append((found.st_size, found.st_mtime_ns))
        except OSError:
            states.append((0, 0))
    return states


def of_read(pool: FilePool) -> dict[str, str]:
    """Return the fingerprint by content of files, which this reads."""

    def hashed(path: bytes) -> bytes:
        try:
            with open(os.path.join(os.fsencode(pool.root), path), "rb") as file:
                return content_hash(file.read())
        except OSError:
            return b""

    with ThreadPoolExecutor(usable_cpus()) as threads:
        return {"contents": _digest(threads.map(hashed, pool.paths.tolist()))}


def content_hash(data: bytes) -> bytes:
    """Return the hash of a file, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest().encode()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\n")
    return digest.hexdigest()


def replaced(split: str, old: Fingerprint, new: Fingerprint) -> str | None:
    """Return why files are not those of a run, in words; None where nothing tells that they are others.

    Args:
        split: its name in words.
        old: of the run.
        new: of the files now; what only one of both has is not compared.
    """
    what = {"contents": "hold other data", "sizes": "have other sizes"}
    found = next((key for key in what if key in old and key in new and old[key] != new[key]), None)
    return None if found is None else f"{split} images of the same names {what[found]} than when the run began"


def touched(split: str, old: Fingerprint, new: Fingerprint) -> str | None:
    """Return a sentence where nothing but the times of files differ, as copies have them and changed files too."""
    if "times" not in old or "times" not in new or old["times"] == new["times"]:
        return None
    return (
        f"{split} images have other times than when the run began, and the same names and sizes; they are not read "
        f"beforehand, so make sure that they are the same"
    )
