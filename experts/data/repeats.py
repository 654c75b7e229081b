"""Images that are in a set more than once: by the path of their file, or by what the file holds.

A file twice in training counts twice. One under two labels teaches a contradiction. One in training and test makes the
test too good. None of it changes what is trained on; all of it is counted and said.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from experts.data.pools import FilePool
from experts.data.remarks import Remark, shown


def repeated_files(pools: Mapping[str, FilePool]) -> Iterator[Remark]:
    """Yield what is repeated by path, `a/../b` and `b` being one.

    Args:
        pools: by the name of their split, in words, the training images first.
    """
    paths = {split: [_plain(path) for path in pool.paths.tolist()] for split, pool in pools.items()}
    for split, pool in pools.items():
        yield from _within(split, paths[split], pool, "file", "the same file")
    for one, other in combinations(pools, 2):
        known = set(paths[one])
        both = [at for at, path in enumerate(paths[other]) if path in known]
        yield from _across(one, other, pools[other], both, "file", "by path")


def repeated_contents(pools: Mapping[str, FilePool], contents: Mapping[str, np.ndarray]) -> Iterator[Remark]:
    """Yield what is repeated by content, beyond what is repeated by path.

    Args:
        pools: as for `repeated_files`; those without contents are left out.
        contents: hashes of the files, bytes [N], by split.
    """
    paths = {split: [_plain(path) for path in pools[split].paths.tolist()] for split in contents}
    hashes = {split: contents[split].tolist() for split in contents}
    for split in contents:
        first = {path: at for at, path in reversed(list(enumerate(paths[split])))}
        once = np.array(sorted(first.values()), dtype=np.int64)  # a file that is listed twice is told of by its path
        keys = [hashes[split][at] for at in once.tolist()]
        yield from _within(split, keys, pools[split].take(once), "content", "equal files")
    for one, other in combinations(contents, 2):
        known, told = set(hashes[one]), set(paths[one])
        both = [
            at
            for at, (key, path) in enumerate(zip(hashes[other], paths[other], strict=True))
            if key in known and path not in told
        ]
        yield from _across(one, other, pools[other], both, "content", "by content")


def _plain(path: bytes) -> bytes:
    return os.path.normpath(path) if b"//" in path or b"./" in path else path


def _within(split: str, keys: list[bytes], pool: FilePool, by: str, what: str) -> Iterator[Remark]:
    """Yield what one split holds twice, under one label or under two."""
    if len(set(keys)) == len(keys):
        return
    first: dict[bytes, int] = {}
    again = [(at, first[key]) for at, key in enumerate(keys) if first.setdefault(key, at) != at]
    labels = pool.labels
    other = [(at, before) for at, before in again if labels[at] != labels[before]]
    same = len(again) - len(other)
    if same:
        at, before = next((a, b) for a, b in again if labels[a] == labels[b])
        yield Remark(
            f"repeated_{by}",
            same,
            f"{same:,} of {len(keys):,} {split} images are there already: {what} under one label, first "
            f"{_pair(pool, at, before)}; each counts again",
            doubt=True,
        )
    if other:
        at, before = other[0]
        yield Remark(
            f"two_labels_{by}",
            len(other),
            f"{len(other):,} of {len(keys):,} {split} images are there under another label: {what}, first "
            f"{_pair(pool, at, before)} with labels {labels[before]} and {labels[at]}",
            doubt=True,
        )


def _pair(pool: FilePool, at: int, before: int) -> str:
    one, other = shown(pool.paths[before]), shown(pool.paths[at])
    return one if one == other else f"{one} and {other}"


def _across(one: str, other: str, pool: FilePool, both: list[int], by: str, how: str) -> Iterator[Remark]:
    if both:
        yield Remark(
            f"overlap_{by}",
            len(both),
            f"{len(both):,} of {len(pool.labels):,} {other} images are {one} images too ({how}), first "
            f"{shown(pool.paths[both[0]])}",
            doubt=True,
        )
