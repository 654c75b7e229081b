"""A tree of config values in which every value knows the layer that set it.

Layers are laid one over the other. A mapping is merged key by key, with one exception: where it names another piece
than the layers below, it replaces theirs, because their keys belong to the piece that is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

Path = tuple[str, ...]

COMMAND_LINE = "command line"


class Layered:
    """A nested mapping under construction.

    Attributes:
        tree: the values so far.
        origins: by path, the layer that set a value. Lists, empty mappings and null count as values.
    """

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[Path, str] = {}

    def get(self, path: Sequence[str]) -> Any:
        """Return what lies at a path; None where there is nothing."""
        place: Any = self.tree
        for key in path:
            place = place.get(key) if isinstance(place, dict) else None
        return place

    def lay(self, content: Mapping[str, Any], origin: str, below: Path = ()) -> None:
        """Lay a nested mapping over what is there."""
        for key, value in content.items():
            path = (*below, str(key))
            if not isinstance(value, Mapping) or not value:
                if value != {} or not isinstance(self.get(path), dict):
                    self.put(path, value, origin)
                continue
            old = self.get(path)
            if not isinstance(old, dict) or _names_another_piece(path, old, value):
                self.put(path, {}, origin)
            self.origins.pop(path, None)  # a mapping with keys is no value of its own
            self.lay(value, origin, path)

    def put(self, path: Path, value: Any, origin: str) -> None:
        """Set one value as a whole, whatever was there."""
        place = self.tree
        for depth, key in enumerate(path[:-1], 1):
            if not isinstance(place.get(key), dict):
                place[key] = {}
            self.origins.pop(path[:depth], None)
            place = place[key]
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        place[path[-1]] = copy.deepcopy(value)
        self.origins[path] = origin

    def origin(self, path: Sequence[str]) -> str | None:
        """Return the layer that set the value at a path, or the value that holds it; None if none did."""
        for length in range(len(path), 0, -1):
            if found := self.origins.get(tuple(path[:length])):
                return found
        return None


def _names_another_piece(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    # The names of the method and of the data set are no pieces.
    is_piece = path == ("backbone",) or (path[0] == "method" and len(path) > 1)
    return is_piece and "name" in new and "name" in old and new["name"] != old["name"]
