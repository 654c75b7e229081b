"""`expertail show`: the resolved recipe as YAML, each value with the file that it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import yaml

from orchestration.config.compose import Composed, compose
from orchestration.config.folders import with_path

_WIDEST = 72  # a longer line has its comment right behind it
_DEFAULT = "default"


def show_text(words: list[str], everything: bool = False) -> str:
    """Compose a recipe and describe it.

    Args:
        words: as for training.
        everything: also show the keys that no file and no word sets.

    Returns:
        YAML that reads back as the config, or as the part of it that is set.

    Raises:
        ValueError: the config is not valid.
    """
    composed = compose(words)
    rows = list(_rows(composed.config.model_dump(mode="json"), composed, (), everything))
    column = max((len(text) for text, origin in rows if origin and len(text) <= _WIDEST), default=0)
    lines = [f"{text:{column}}  # {origin}" if origin else text for text, origin in rows]
    head = [f"made of, later ones win: {', '.join(map(_with_file, composed.files))}", *composed.notes]
    return "\n".join([*(f"# {line}" for line in head), *lines])


def _rows(
    values: dict[str, Any], composed: Composed, path: tuple[str, ...], everything: bool
) -> Iterator[tuple[str, str | None]]:
    """Yield a line for every key below a path, with where its value comes from; None for a key that has keys."""
    indent = "  " * len(path)
    for key, value in values.items():
        where = (*path, key)
        named = f"{indent}{_flow(key)}:"
        if isinstance(value, dict) and value and "." not in "".join(value):
            inner = list(_rows(value, composed, where, everything))
            if inner:
                yield named, None
                yield from inner
            continue
        origin = composed.layered.origin(where)
        if origin is not None or everything:
            yield f"{named} {_flow(value)}", _with_percentage(composed, where, origin or _DEFAULT)


def _with_file(name: str) -> str:
    """Name a file that made the recipe, with its path where it is the user's."""
    named, _, path = with_path(name).partition(", ")
    return f"{named} ({path})" if path else named


def _with_percentage(composed: Composed, where: tuple[str, ...], origin: str) -> str:
    """Name the percentages that became a value's epochs."""
    stage, key = where[2:3], ".".join(where[3:])
    found = [r for r in composed.resolved if (r.stage,) == stage and r.key == key and where[:2] == ("method", "stages")]
    if not found:
        return origin
    shares = (f"{r.percentage}{' (left out: the end)' if r.left_out else ''}" for r in found)
    return f"{origin}: {', '.join(shares)} of the epochs"


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
