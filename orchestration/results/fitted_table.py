"""The numbers that a recipe left open, as stages without steps have chosen them, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orchestration.results.text import decimals, text_table

_FEW = 9  # numbers tried that are all shown; of more, the best ones
_BEST = 5


class Chosen(NamedTuple):
    """One number that a stage chose.

    Attributes:
        stage: its name.
        key: of the config below the stage, e.g. `head.gamma`.
        value: that was taken.
        split: that it was chosen on; None where there was none.
        origin: where the published number comes from.
        published: that number.
        tried: (number, mean of per-class accuracies on the split), in the order tried; empty without a split.
    """

    stage: str
    key: str
    value: float
    split: str | None
    origin: str
    published: float
    tried: tuple[tuple[float, float], ...]


def choices(
    found: Mapping[str, Mapping[str, Any]], finals: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> list[Chosen]:
    """Return every number that the stages shown have chosen.

    Args:
        found: the run's evaluations, "last" and "best".
        finals: those of each final stage, where there are several.
    """
    return [chosen for evaluations in (finals.values() or [found]) for chosen in _of(evaluations)]


def _of(evaluations: Mapping[str, Mapping[str, Any]]) -> Iterator[Chosen]:
    evaluation = evaluations.get("last") or evaluations.get("best") or {}  # a stage without steps has one state
    for choice in (evaluation.get("fitted") or {}).get("choices", []):
        tried = tuple((float(number), float(accuracy)) for number, accuracy in choice["tried"])
        yield Chosen(str(evaluation.get("stage", "")), **{**choice, "tried": tried})


def fitted_lines(chosen: list[Chosen]) -> list[str]:
    """Return a line for each number: what was taken, and why; below it, what was tried.

    Of many numbers the best are shown, those at both ends, and the published one; an evaluation holds all.
    """
    if not chosen:
        return []
    lines = ["", "Numbers that the recipe left open"]
    for one in chosen:
        published = f"{one.published:g} ({one.origin})"
        if one.split is None:
            lines.append(
                f"{one.stage}: {one.key} = {one.value:g}, published default used: {published}; there is no validation "
                f"split to choose on"
            )
            continue
        lines.append(f"{one.stage}: {one.key} = {one.value:g}, chosen on {one.split}; published: {published}")
        lines += [f"  {line}" for line in _tried(one)]
    return lines


def _tried(one: Chosen) -> list[str]:
    shown = _worth_showing(one)
    rows = [
        [one.key, *(f"{number:g}" for number, _ in shown)],
        [f"mean of per-class accuracies on {one.split}, %", *(decimals(value, 100.0, 2) for _, value in shown)],
    ]
    numbers = [number for number, _ in one.tried]
    lines = text_table(rows)
    if len(shown) < len(numbers):
        lines.append(
            f"{len(numbers)} numbers from {min(numbers):g} to {max(numbers):g} were tried; shown: the best {_BEST}, "
            f"both ends, the published one"
        )
    if len(numbers) > 1 and one.value == max(numbers):
        lines.append("the largest number tried was the best: a larger one may be better")
    return lines


def _worth_showing(one: Chosen) -> list[tuple[float, float]]:
    """Return the numbers to show, with their accuracies, in ascending order."""
    ordered = sorted(one.tried)
    if len(ordered) <= _FEW:
        return ordered
    best = sorted(one.tried, key=lambda pair: -pair[1])[:_BEST]  # stable: of equals the first tried, as when chosen
    kept = {ordered[0], ordered[-1], *best, *(pair for pair in ordered if pair[0] in (one.published, one.value))}
    return [pair for pair in ordered if pair in kept]
