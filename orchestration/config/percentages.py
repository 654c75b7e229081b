"""Epochs of a stage as a percentage of its length: `after_epoch: 80%`.

They become whole epochs last of all, when the length is known, so a shortened stage has its drops earlier. Rounded half
up, and a drop comes at least one epoch after the start. A drop that rounds to the end of the stage is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from orchestration.config.origins import Layered

_PERCENTAGE = re.compile(r"-?\d+(\.\d+)?\s*%")
_OF_EPOCHS = re.compile(r"(.*_)?(epochs?|warmup)")
_LONGER = 1000  # epochs by which a stage may be lengthened to tell two percentages apart
_STAND_IN = 100  # for a number of epochs that is itself refused later, with its own message


@dataclass(frozen=True)
class Resolved:
    """One percentage that became epochs: its stage, its key in the stage, and both values."""

    stage: str
    key: str
    percentage: str
    epochs: int
    """0: of a warm-up, that there is none."""
    left_out: bool = False


def resolve_percentages(layered: Layered) -> tuple[list[Resolved], list[str]]:
    """Replace every percentage by whole epochs, in place.

    Returns:
        What became of each, and a problem for each one that cannot be.
    """
    stages = layered.get(("method", "stages"))
    resolved: list[Resolved] = []
    problems: list[str] = []
    for name, stage in (stages if isinstance(stages, dict) else {}).items():
        if not isinstance(stage, dict):
            continue
        if is_percentage(stage.get("epochs")):
            problems.append(
                f"method.stages.{name}.epochs = {stage['epochs']}: of what? needed a whole number of epochs"
            )
        walk = _Stage(name, stage.get("epochs"))
        walk.resolve(stage, "")
        resolved += walk.resolved
        problems += walk.problems
    return resolved, problems


def is_percentage(value: Any) -> bool:
    """Return whether a value is written as a percentage."""
    return isinstance(value, str) and _PERCENTAGE.fullmatch(value) is not None


class _Stage:
    """The walk through one stage."""

    def __init__(self, name: str, epochs: Any) -> None:
        self.name = name
        self.epochs = epochs if isinstance(epochs, int) and not isinstance(epochs, bool) and epochs > 0 else _STAND_IN
        self.resolved: list[Resolved] = []
        self.problems: list[str] = []

    def resolve(self, values: dict[str, Any], above: str) -> None:
        for key, value in values.items():
            full = f"{above}{key}"
            if isinstance(value, dict):
                self.resolve(value, f"{full}.")
            elif isinstance(value, list):
                values[key] = self._drops(value, full)
            elif above and is_percentage(value) and _OF_EPOCHS.fullmatch(key):
                values[key] = epochs = self._rounded(value, full)
                self.resolved.append(Resolved(self.name, full, value, epochs))

    def _rounded(self, percentage: str, key: str) -> int:
        if not 0 < _share(percentage) < 100:
            self.problems.append(
                f"method.stages.{self.name}.{key} = {percentage}: needed more than 0% and less than 100% of "
                f"the stage's epochs, e.g. 80%, or a whole epoch"
            )
            return 1
        least = 0 if key.rpartition(".")[2].startswith("warmup") else 1
        return max(least, _round(percentage, self.epochs))

    def _drops(self, entries: list[Any], key: str) -> list[Any]:
        """Resolve a list of mappings with an epoch each; two of them must not come to the same one."""
        kept: list[Any] = []
        taken: dict[int, str] = {}
        for place, entry in enumerate(entries):
            if isinstance(entry, dict) and "name" in entry:  # a piece, with an epoch of its own
                self.resolve(entry, f"{key}.{place}.")
            field = _epoch_field(entry)
            if field is None:
                kept.append(entry)
                continue
            percentage = entry[field]
            epoch = self._rounded(percentage, f"{key}.{field}")
            ends = epoch >= self.epochs
            self.resolved.append(Resolved(self.name, key, percentage, epoch, left_out=ends))
            if ends:
                continue
            if epoch in taken:
                self.problems.append(
                    f"method.stages.{self.name}.{key}: {taken[epoch]} and {percentage} of {self.epochs} epochs both "
                    f"round to epoch {epoch}; needed different ones; {self._way_out(taken[epoch], percentage, field)}"
                )
            taken[epoch] = percentage
            kept.append(entry | {field: epoch})
        return kept

    def _way_out(self, one: str, other: str, field: str) -> str:
        """Say how two percentages come to different epochs."""
        lengths = range(self.epochs, self.epochs + _LONGER)  # none of them does for equal percentages
        apart = next((n for n in lengths if _round(one, n) != _round(other, n)), None)
        return f"change {field} of either" if apart is None else f"set epochs to {apart}, or {field} in whole epochs"


def _share(percentage: str) -> Decimal:
    return Decimal(percentage.rstrip("% "))


def _round(percentage: str, epochs: int) -> int:
    return int((_share(percentage) * epochs / 100).quantize(Decimal(1), ROUND_HALF_UP))


def _epoch_field(entry: Any) -> str | None:
    """Return the key of a list's entry that is a percentage of epochs."""
    items = entry.items() if isinstance(entry, dict) else ()
    return next((key for key, value in items if is_percentage(value) and _OF_EPOCHS.fullmatch(key)), None)
