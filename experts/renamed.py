"""Keys that a stage's config had in earlier versions, before what they set was a piece."""

from __future__ import annotations

from typing import NamedTuple


class Renamed(NamedTuple):
    """New names of keys that are gone.

    Attributes:
        key: of a stage, where a piece is set.
        piece: name of the piece that the mapping under the old key configures.
    """

    key: str
    piece: str


RENAMED = {"mixup": Renamed("mixing", "mixup")}
"""By the old key. Where it was null nothing takes its place."""
