"""Remarks on images that a set does not simply use: cut, held out, skipped, there twice. Each is counted and said.

A remark goes to the first lines of a run, above its table and into data.json, so a user who looks at either learns that
the numbers are of fewer or other images than there are files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from experts.data.names import visible


@dataclass(frozen=True)
class Remark:
    """One thing to know of a data set.

    Attributes:
        kind: of the remark, a word for programs, e.g. "held_out".
        count: images or files that it is about.
        text: the same for people, one line.
        doubt: whether it may be a mistake of whoever made the set.
    """

    kind: str
    count: int
    text: str
    doubt: bool = False


def shown(path: bytes | str) -> str:
    r"""Return a path for a message: bytes that are no text, and letters that a terminal would act on, as \x and two
    digits."""
    return visible(os.fsdecode(path))


def named(class_names: Sequence[str] | None, c: int) -> str:
    """Return how a message calls a class: its number, and its name where it has another one."""
    if class_names is None or class_names[c] == str(c):
        return f"class {c}"
    return f"class {c} ('{shown(class_names[c])}')"
