"""The pictures of a report, the same for every recipe. One whose data is not there is left out, and that is said."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from orchestration.reports.curve_plots import curves_figures, shift_figure
from orchestration.reports.group_plots import across_figure, against_figure, cost_figure, groups_figure, relative_figure
from orchestration.reports.report import Report, Section
from orchestration.reports.rows import Row, recipe_keys, short_key
from orchestration.results.style import draw_to

Picture = tuple[int, Path, str]
"""Number of the table, 0 for several, file and title of a picture."""

_TITLES = {
    "groups": "Accuracy by group with spread",
    "cost": "Accuracy on the rarest classes against cost",
    "relative": "Accuracy against relative accuracy",
    "shift": "Accuracy over test distributions",
    "curves_loss": "Training loss over epochs",
    "curves_accuracy": "Accuracy over epochs",
}
_AXES = {"num_experts": "number of experts", "flow.ratio": "share of channels replaced, p"}
"""Words for numbers, by the key as labels show it."""
_NEEDS = {
    "cost": "costs of two rows",
    "relative": "runs on the balanced variant of the data",
    "shift": "`expertail evaluate RUN --model {which} --weights test-time --distribution published`",
    "curves_loss": "three epochs of a journal",
    "curves_accuracy": "three evaluations of a run (run.evaluate_every_epochs)",
    "against": "rows that differ in one number, such as H2T's ratio or method.num_experts",
}


def draw_pictures(report: Report, folder: Path, say: Callable[[str], None]) -> list[Picture]:
    """Draw everything there is data for.

    Args:
        report: what is shown.
        folder: of the files.
        say: takes one line for all pictures that were left out, and one for each that failed.
    """
    drawn: list[Picture] = []
    missing: dict[str, list[int]] = {}
    for one in report.across:
        path = folder / f"across_{one.key.replace('.', '_')}-0.png"
        if draw_to(path, partial(across_figure, report, one), say, " ".join(one.families)):
            drawn.append((0, path, f"Accuracy over {one.name}"))
    for section in report.sections:
        number = section.table.number
        found, kinds = _drawers(report, section)
        for name, (title, draw) in found.items():
            path = folder / f"{name}-{number}.png"
            if draw_to(path, draw, say, " ".join(row.label for row in section.table.rows)):
                drawn.append((number, path, title))
                kinds.add(name)
        kinds |= {"against"} if report.across else set()
        for kind in _NEEDS:
            if kind not in kinds:
                missing.setdefault(kind, []).append(number)
    if missing:
        say(f"pictures left out for want of data: {'; '.join(_left_out(report, missing))}")
    _remove_others(folder, {path.name for _, path, _ in drawn})
    return drawn


def _left_out(report: Report, missing: Mapping[str, list[int]]) -> Iterator[str]:
    """Yield every kind of picture that some tables have no data for, those tables, and what it needs."""
    for kind, numbers in missing.items():
        title = _TITLES.get(kind, "Accuracy against a number")
        every = len(numbers) == len(report.sections)
        where = "" if every else f" in table {', '.join(map(str, numbers))}"
        yield f"{title[0].lower()}{title[1:]}{where} (needs {_NEEDS[kind].format(which=report.which)})"


def _drawers(report: Report, section: Section) -> tuple[dict[str, tuple[str, Callable[[], Any]]], set[str]]:
    """Return the title and what draws it by name of file, and kinds that there are for certain."""
    found: dict[str, tuple[str, Callable[[], Any]]] = {
        "groups": (_TITLES["groups"], lambda: groups_figure(report, section)),
        "cost": (_TITLES["cost"], lambda: cost_figure(report, section)),
        "relative": (_TITLES["relative"], lambda: relative_figure(report, section)),
        "shift": (_TITLES["shift"], lambda: shift_figure(report, section)),
    }
    kinds = set()
    for key, families in varied_numbers(section).items():
        name, kind = _AXES.get(short_key(key), short_key(key)), f"against_{key.replace('.', '_')}"
        found[kind] = (f"Accuracy against {name}", _against(report, section, name, families))
        kinds.add("against")
    for name, draw in curves_figures(report, section).items():
        found[name] = (_TITLES[name], draw)
    return found, kinds


def _against(
    report: Report, section: Section, name: str, families: Mapping[str, list[tuple[float, Row]]]
) -> Callable[[], Any]:
    return lambda: against_figure(report, section, name, families)


def varied_numbers(section: Section) -> dict[str, dict[str, list[tuple[float, Row]]]]:
    """Return numbers that rows of one recipe differ in: by key, then by recipe, their values and rows.

    A study's labels say what was varied. Outside a study it is the one number among the keys in which rows of a recipe
    differ; with the number of experts other keys may change.
    """
    rows = section.table.rows
    parts = {row.label: _parts(row) for row in rows}
    found: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    for key in dict.fromkeys(key for own in parts.values() for key in own):
        families: dict[str, list[tuple[float, Row]]] = {}
        for row in rows:
            own = parts[row.label]
            value = _number(own.get(key))
            if value is not None:
                rest = {k: v for k, v in own.items() if k != key}
                if key.endswith("num_experts") and "recipe" in own:
                    rest = {"recipe": own["recipe"]}
                families.setdefault(repr(sorted(rest.items(), key=lambda item: item[0])), []).append((value, row))
        several = [members for members in families.values() if len({value for value, _ in members}) > 1]
        if several:
            found[key] = {_family(members): members for members in several}
    return found


def _parts(row: Row) -> dict[str, Any]:
    record = row.records[0]
    if not record.label:
        return recipe_keys(record)
    return {**record.label, "final stage": record.stage}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    with contextlib.suppress(ValueError):
        return float(value)
    return None


def _family(members: list[tuple[float, Row]]) -> str:
    """Return what the labels of rows begin with."""
    labels = [row.label for _, row in members]
    words = [label.split(" ") for label in labels]
    common = [word for word in words[0] if all(word in other for other in words)]
    return " ".join(common) or labels[0]


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove pictures of an earlier report that are not part of this one."""
    for path in folder.glob("*-[0-9]*.png"):
        if path.name not in names:
            path.unlink(missing_ok=True)
