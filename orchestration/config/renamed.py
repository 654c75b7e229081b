"""Configs of saved runs, in the keys of this version; the table of old keys is experts/renamed.py."""

from __future__ import annotations

from typing import Any

from experts.renamed import RENAMED


def with_new_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a saved run's config as this version writes it; what has no old key is the same."""
    method = tree.get("method")
    if not isinstance(method, dict) or not isinstance(stages := method.get("stages"), dict):
        return tree
    return {**tree, "method": {**method, "stages": {name: _stage(stage) for name, stage in stages.items()}}}


def _stage(stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    found = {key: value for key, value in stage.items() if key not in RENAMED}
    for old, new in RENAMED.items():
        value = stage.get(old)
        if isinstance(value, dict):
            found[new.key] = {"name": new.piece, **value}
    return found
