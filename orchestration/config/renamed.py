"""Keys of stages that earlier versions had: what they are called now, for configs of saved runs and for messages."""

from __future__ import annotations

from typing import Any, NamedTuple


class Renamed(NamedTuple):
    """The place of a key that is gone."""

    key: str
    piece: str
    """What the mapping under the old key configures: the piece of this name."""


RENAMED = {"mixup": Renamed("mixing", "mixup")}
"""By the old key. Where it is null nothing takes its place."""


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
