"""Kinds of files: those that are images, and names that never are."""

from __future__ import annotations

import functools
import os
import struct

from PIL import Image

_NEVER = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "IMT"}
"""Formats that Pillow names but hands to other programs (EPS runs Ghostscript), or cannot decode."""
_HIDDEN = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "@eadir",
    "@recycle",
    "@synoresource",
    "__macosx",
    "__pycache__",
    "$recycle.bin",
    "#recycle",
    "#snapshot",
    "lost+found",
    "system volume information",
}


def is_hidden(name: str) -> bool:
    """Say whether a file or folder is of those that systems and tools put beside images."""
    return name[0] == "." or name.casefold() in _HIDDEN


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats that are decoded, as Pillow names them; those that know their files by no mark come last."""
    Image.init()
    known = [name for name in Image.OPEN if name not in _NEVER]
    return tuple(sorted(known, key=lambda name: Image.OPEN[name][1] is None))


@functools.cache
def endings() -> frozenset[str]:
    """Return the endings of those formats, lower case, with their dots."""
    return frozenset(end for end, name in Image.registered_extensions().items() if name in formats())


def ending_of(name: str) -> str:
    """Return the ending of a file's name, lower case, with its dot; empty where it has none."""
    return os.path.splitext(name)[1].lower()


def looks_like_image(path: str) -> bool:
    """Say whether a file whose ending says nothing is an image, by its first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        marked = [name for name in formats() if (accepts := Image.OPEN[name][1]) and _accepted(accepts, start)]
        if not marked:
            return False
        with Image.open(path, formats=marked):  # the header, too: two letters alone begin many texts
            return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _accepted(accepts: object, start: bytes) -> bool:
    try:
        return accepts(start) is True  # type: ignore[operator]  # a text says that this build cannot decode it
    except (IndexError, struct.error, TypeError):
        return False
