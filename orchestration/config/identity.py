"""What makes two runs the same: the keys that a resume must find unchanged."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from orchestration.config.run_config import (
    RunConfig,
)

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
)
"""What a resume may say differently; `run.evaluate_every_epochs` and `run.select_on` may not (`identity`). Other data
under a moved root or list is found by its digest."""


def identity(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides the numbers, as one flat mapping of dotted keys."""
    flat = flatten(config.model_dump(mode="json"))
    kept = {key: value for key, value in flat.items() if not _covered(key, MAY_CHANGE)}
    for key in ("run.evaluate_every_epochs", "run.select_on"):
        kept[key] = flat[key]
    return kept


def config_hash(config: RunConfig) -> str:
    """Twelve hexadecimal digits that name the identity of a run."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines 'key: old -> new' for every key in which two identities differ."""
    absent = object()
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, absent), new.get(key, absent)
        if a != b:
            lines.append(f"{key}: {'(unset)' if a is absent else a} -> {'(unset)' if b is absent else b}")
    return lines


def published(config: RunConfig) -> str | None:
    """One line with the published result, or None where there is none for exactly this config."""
    expected = config.method.expected
    if expected is None:
        return None
    flat = flatten(config.model_dump(mode="json"))
    if any(flat.get(key) != value for key, value in expected.conditions.items()):
        return None
    numbers = ", ".join(f"{group} {value:g}" for group, value in expected.top1.items())
    return f"published, top-1 in %: {numbers} ({expected.remark})"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys for a nested mapping; lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _covered(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(root + ".") for root in roots)
