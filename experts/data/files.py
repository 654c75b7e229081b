"""Image files in a folder per class. Nothing is decoded here.

Files are images by their ending; where that says nothing, by their first bytes. Links are followed, each folder once.
What systems put beside images is never one. Whatever is skipped is counted.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.download import require_root
from experts.data.kinds import ending_of, endings, is_hidden, looks_like_image
from experts.data.pools import FilePool, RawDataset
from experts.data.remarks import Remark, shown

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
"""The most usual endings, for messages; `kinds.endings` are all."""
_SHOWN = 4  # kinds of skipped files in a message


def open_image_folder(config: DatasetConfig) -> RawDataset:
    """List a tree with one folder per class. Classes and files are sorted by name.

    With root/train, the folders beside it are the other splits: root/test is the test set and root/val the validation
    set; without root/test, root/val is the test set. Without root/train, root itself holds the class folders, and
    images of each class are held out as the test set. Train, training, valid and the like are known, in any case.
    """
    root = require_root(config, "a folder with train/<class>/<image> and test/<class>/<image>, or with <class>/<image>")
    splits = split_folders(root)
    skipped = _Skipped()
    if "train" not in splits:
        if splits:
            raise ValueError(
                f"dataset.root = {root}: found {'/ and '.join(splits.values())}/ but no train/; needed train/ "
                f"beside them, or class folders only"
            )
        names, pool = _scan(root, "", None, skipped)
        return RawDataset(names, pool, remarks=tuple(skipped.remarks()))
    names, train = _scan(root, splits["train"], None, skipped)
    others = {s: _scan(root, splits[s], names, skipped)[1] for s in ("val", "test") if s in splits}
    if "test" not in others and "val" in others:  # as in ImageNet, whose test labels are not public
        others["test"] = others.pop("val")
    return RawDataset(names, train, others.get("val"), others.get("test"), tuple(skipped.remarks()))


def split_folders(root: str) -> dict[str, str]:
    """Return the folders in root that are splits, by "train", "val" and "test"; exact names only where none is train.

    Raises:
        ValueError: two folders may be the same split.
    """
    everything = _folders(root)
    folders = [name for name in everything if name.casefold() in _SPLITS and not _is_class(root, name, everything)]
    if not any(_SPLITS[name.casefold()] == "train" for name in folders):
        folders = [name for name in folders if name in ("val", "test")]  # else a class may be called Test
    found: dict[str, str] = {}
    for name in sorted(folders, key=lambda name: name not in ("train", "val", "test")):
        split = _SPLITS[name.casefold()]
        if split in found and found[split] != split:
            raise ValueError(
                f"dataset.root = {root}: found {found[split]}/ and {name}/; needed one folder of {split} images; "
                f"rename the right one to {split}/"
            )
        found.setdefault(split, name)
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _is_class(root: str, name: str, beside: Sequence[str]) -> bool:
    """Say whether a folder called train holds pictures of trains: files and no folder, beside other classes."""
    others = [other for other in beside if other.casefold() not in _SPLITS and not is_hidden(other)]
    return bool(others) and _SPLITS[name.casefold()] == "train" and not class_folders(os.path.join(root, name))


def class_folders(base: str) -> list[str]:
    """Return the names of the class folders in a split's folder, sorted."""
    return sorted(name for name in _folders(base) if not is_hidden(name))


def _folders(base: str) -> list[str]:
    return [entry.name for entry in _entries(base) if _is_folder(entry)]


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise ValueError(f"{shown(folder)}: cannot be listed ({error.strerror}); check its permissions") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class _Skipped:
    """Counts of what is no image, by kind."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.hidden: Counter[str] = Counter()
        self.reached_again: list[str] = []
        self.outside: list[str] = []
        self.special: list[str] = []
        self.alike: list[tuple[str, str]] = []

    def remarks(self) -> Iterator[Remark]:
        others = [self.endings, self.hidden]
        parts = [_counted(kinds) for kinds in others]
        total = sum(kinds.total() for kinds in others) + len(self.special)
        what = []
        if self.endings:
            what.append(f"{self.endings.total():,} that are no images ({parts[0]})")
        if self.hidden:
            what.append(f"{self.hidden.total():,} of the system or hidden ({parts[1]})")
        if self.special:
            what.append(f"{len(self.special):,} that are no files, first {shown(self.special[0])}")
        if total:
            yield Remark("skipped", total, f"skipped in class folders: {', '.join(what)}")
        if self.reached_again:
            count, first = len(self.reached_again), shown(self.reached_again[0])
            yield Remark(
                "loop",
                count,
                f"links to folders that are read already, not followed: {count:,}, first {first}",
                doubt=True,
            )
        if self.alike:
            one, other = map(shown, self.alike[0])
            yield Remark(
                "alike",
                len(self.alike),
                f"classes whose names differ in capitals or spelling alone: {len(self.alike):,}, first {one} and "
                f"{other}",
                doubt=True,
            )
        if self.outside:
            count, first = len(self.outside), shown(self.outside[0])
            yield Remark(
                "outside", count, f"images in no class folder, which are not used: {count:,}, first {first}", True
            )


def _counted(kinds: Counter[str]) -> str:
    shown_kinds = [f"{count:,} {shown(kind)}" for kind, count in kinds.most_common(_SHOWN)]
    more = len(kinds) - _SHOWN
    return ", ".join([*shown_kinds, f"{more} more kinds"] if more > 0 else shown_kinds)


def _scan(
    root: str, split: str, expected: tuple[str, ...] | None, skipped: _Skipped
) -> tuple[tuple[str, ...], FilePool]:
    base = os.path.join(root, split) if split else root
    names = tuple(class_folders(base))
    if not names:
        raise ValueError(
            f"{base}: found no class folder; needed one folder per class with its images; check dataset.root = {root}"
        )
    folders = list(names) if expected is None else _in_order(expected, names)
    if folders is None:
        assert expected is not None
        extra, missing = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
        wrong = "; ".join(
            [f"{shown(name)} is not in train/ ({len(extra)} such)" for name in extra[:1]]
            + [f"{shown(name)} is missing ({len(missing)} such)" for name in missing[:1]]
        )
        raise ValueError(f"{base}: its class folders differ from those of train/: {wrong}; give both the same")
    if expected is None:
        skipped.alike += _alike(names)
    _note_beside(base, skipped)
    paths: list[str] = []
    labels: list[int] = []
    above = {_identity(root), _identity(base)}
    for c, name in enumerate(folders):
        if name is None:
            continue
        before = skipped.endings.copy()
        found = _walk(os.path.join(base, name), above, skipped)
        if not found and expected is None:
            others = _counted(skipped.endings - before)
            raise ValueError(
                f"{shown(os.path.join(base, name))}: class '{shown(name)}' has no image"
                f"{f' (found {others})' if others else ''}; needed at least one file that ends in "
                f"{', '.join(EXTENSIONS[:4])} ...; add images or remove the folder"
            )
        paths += [os.path.join(split, name, f) for f in found]
        labels += [c] * len(found)
    # Bytes, not text: a name that is not UTF-8 survives, and millions of paths take a quarter of the memory.
    return expected or names, FilePool(
        root, np.array([os.fsencode(p) for p in paths]), np.array(labels, dtype=np.int64)
    )


def _letters(name: str) -> str:
    """Return a name in one spelling: a Mac writes é as e and an accent, others as one letter."""
    return unicodedata.normalize("NFC", name)


def _in_order(expected: Sequence[str], names: Sequence[str]) -> list[str | None] | None:
    """Return the folder of each class in a split, None for one that it lacks; None where it has other classes."""
    classes, there = set(expected), set(names)
    spelled = {_letters(name): name for name in names if name not in classes}
    found = [name if name in there else spelled.pop(_letters(name), None) for name in expected]
    return None if spelled or sum(name is not None for name in found) < len(names) else found


def _alike(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of classes whose names differ in nothing but capitals or the spelling of their letters."""
    first: dict[str, str] = {}
    seen = [(name, first.setdefault(_letters(name).casefold(), name)) for name in names]
    return [(before, name) for name, before in seen if before != name]


def _note_beside(base: str, skipped: _Skipped) -> None:
    """Count what lies beside class folders."""
    for entry in _entries(base):
        if _is_folder(entry):
            if is_hidden(entry.name):
                skipped.hidden[entry.name] += 1
        elif not is_hidden(entry.name) and ending_of(entry.name) in endings():
            skipped.outside.append(entry.path)


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def images_below(folder: str) -> list[str]:
    """Return the paths of the images below a folder, relative to it, sorted."""
    return _walk(folder, set(), _Skipped())


def _walk(folder: str, above: set[tuple[int, int]], skipped: _Skipped) -> list[str]:
    """Return the images of a class, relative to its folder, sorted.

    Args:
        above: folders that it lies in; a link to one of them is a loop.
    """
    found: list[str] = []
    read = set(above)
    known = endings()
    waiting = [("", folder)]
    while waiting:
        inside, where = waiting.pop()
        identity = _identity(where)
        if identity in read:
            skipped.reached_again.append(where)
            continue
        read.add(identity)
        for entry in _entries(where):
            name = entry.name
            if is_hidden(name):
                skipped.hidden[name if _is_folder(entry) or name[0] != "." else ".*"] += 1
            elif entry.is_file(follow_symlinks=False):
                if ending_of(name) in known or looks_like_image(entry.path):
                    found.append(inside + name)
                else:
                    skipped.endings[ending_of(name) or "without an ending"] += 1
            elif _is_folder(entry):
                waiting.append((f"{inside}{name}/", entry.path))
            elif _leads_to_image(entry, known):
                found.append(inside + name)
            else:
                skipped.special.append(entry.path)
    return sorted(found)


def _leads_to_image(entry: os.DirEntry[str], known: frozenset[str]) -> bool:
    """Say whether a link leads to an image, or to nothing: what is missing is named when it is decoded."""
    if not entry.is_symlink():  # a pipe, whose reader would wait for ever, or a socket
        return False
    if not os.path.exists(entry.path):
        return ending_of(entry.name) in known
    return os.path.isfile(entry.path) and (ending_of(entry.name) in known or looks_like_image(entry.path))
