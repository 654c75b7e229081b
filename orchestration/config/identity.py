"""The identity of a run: the keys that must not change between its start and a resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from orchestration.config.recipe import Expected
from orchestration.config.run_config import RunConfig

MAY_CHANGE = (
    "cluster",
    "tracking",
    "run",
    "method.expected",
    "dataset.root",
    "dataset.train_list",
    "dataset.val_list",
    "dataset.test_list",
    "dataset.download",
    "dataset.loader_processes",
    "engine.name",
    "engine.graphs",
)
"""Keys that a resume may change, except `run.evaluate_every_epochs` and `run.select_on` (see `identity`). Other data
under a moved root or list is detected by its digest."""


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the part of a config that determines the results, as a flat mapping of dotted keys."""
    flat = flatten(config.model_dump(mode="json"))
    kept = {key: value for key, value in flat.items() if not _covered(key, MAY_CHANGE)}
    for key in ("run.evaluate_every_epochs", "run.select_on"):  # under `run`, but they decide which epoch is "best"
        kept[key] = flat[key]
    return kept


def config_hash(config: RunConfig) -> str:
    """Return twelve hexadecimal digits that name the identity of a run."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]


def deciding_keys(config: RunConfig) -> list[str]:
    """Return the keys that tell a run from another: those that determine the results and are not at their defaults.

    Two configs with different identities differ in one of them. The seed, and names of chosen pieces, are always there.
    """
    known = {*identity(config), "run.max_steps"}
    return [key for key in _keys_set(config) if key in known]


def _keys_set(settings: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of settings that are not at their defaults; lists and empty mappings count as values."""
    for name, field in type(settings).model_fields.items():
        value, always = getattr(settings, name), name == "name" or prefix + name == "seed"
        if always or value != field.get_default(call_default_factory=True):
            yield from _leaves_set(value, prefix + name)


def _leaves_set(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        # Settings that are all at their defaults, where nothing is the default: every key says that they are there.
        yield from list(_keys_set(value, f"{key}.")) or flatten({key: value.model_dump(mode="json")})
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves_set(item, f"{key}.{name}")
    else:
        yield key


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line 'key: old -> new' for every key in which two identities differ."""
    absent = object()
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, absent), new.get(key, absent)
        if a != b:
            lines.append(f"{key}: {'(unset)' if a is absent else a} -> {'(unset)' if b is absent else b}")
    return lines


def published(config: RunConfig) -> str | None:
    """Return one line with the published result, or None if there is none for exactly this config."""
    expected = published_result(config)
    if expected is None:
        return None
    numbers = ", ".join(f"{group} {value:g}" for group, value in expected.top1.items())
    return f"published, top-1 in %: {numbers} ({expected.remark})"


def published_result(config: RunConfig) -> Expected | None:
    """Return the published result of a recipe, or None if there is none for exactly this config."""
    expected = config.method.expected
    if expected is None:
        return None
    flat = flatten(config.model_dump(mode="json"))
    # Published with the data set's own augmentation, unless the conditions name another, and with all epochs.
    conditions = {"dataset.augment.pieces": None, "run.max_steps": None, **expected.conditions}
    return expected if all(flat.get(key) == value for key, value in conditions.items()) else None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys; lists and empty mappings count as values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _covered(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(root + ".") for root in roots)
