"""Published rows beside the runs of a study that meet their conditions. Nothing is trained to know them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experts.data.download import missing_root
from orchestration.config.compose import compose
from orchestration.config.run_config import RunConfig
from orchestration.reports.asked import asked_of
from orchestration.reports.published import Published, printed, published_for, published_tables
from orchestration.reports.rows import recipe_name
from orchestration.results.text import text_table
from orchestration.storage.exports import check_sources
from orchestration.studies.grid import Grid
from orchestration.studies.points import Point
from orchestration.studies.siblings import siblings_in

_NAMES = {"upper": "A_u", "relative": "A_r"}
_SHOWN = 4  # runs without a published row, or rows without a run, that are named


def first_runs(grid: Grid) -> list[tuple[Point, RunConfig]]:
    """Return the first seed of every recipe and value of a study, with its config; no references."""
    first: dict[tuple[str, ...], Point] = {}
    for point in grid.points:
        if point.role == "run":
            first.setdefault(tuple(word for word in point.words if not word.startswith("seed=")), point)
    return [(point, compose(list(point.words)).config) for point in first.values()]


def beside_lines(grid: Grid) -> Iterator[str]:
    """Yield what the runs of a study will be compared with, what is not there for them, and what is missing.

    Raises:
        ValueError: the study's `report` has an unknown key or table.
    """
    asked = asked_of(grid.study.report, f"study {grid.name}")
    tables, rows = asked.tables, first_runs(grid)
    yield from (f"measured  {one.recipe}: {one.weights} weights on {one.distribution} distributions, at the end"
                for one in asked.evaluate)  # fmt: skip
    found = [
        (point, one)
        for point, config in rows
        for stage in finals_of(config)
        if (one := published_for(config, stage, tables)) is not None
    ]
    if found:
        yield from ("", *_table(found), "")
        yield from (f"source    {source}" for source in dict.fromkeys(one.source for _, one in found))
    without = [_unseeded(point) for point, _ in rows if all(point is not other for other, _ in found)]
    if tables is not None and without:
        yield f"without   no published row fits {_named(without)}"
    remarks = dict.fromkeys(f"{one.name}: {remark}" for _, one in found for remark in one.remarks)
    yield from (f"remark    {remark}" for remark in remarks)
    yield from (f"missing   {missing.label}: {missing.why}" for missing in grid.study.missing)
    left = rows_left(tables or (), found, [missing.label for missing in grid.study.missing])
    if meant := rows_meant(left, tables or (), rows):
        yield f"without   no run meets the conditions of the rows {_named(meant)}"
    yield from _files(rows)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def finals_of(config: RunConfig) -> tuple[str, ...]:
    """Return the final stages that have rows of their own; one empty name where there is one."""
    finals = config.method.finals
    return finals if len(finals) > 1 else ("",)


def rows_left(tables: Sequence[str], found: Sequence[tuple[Point, Published]], missing: Sequence[str]) -> list[str]:
    """Return the rows of tables that neither a run meets nor the study lists as missing."""
    there = {one.row for _, one in found} | set(missing)
    return list(
        dict.fromkeys(label for name in tables for label in published_tables()[name].rows if label not in there)
    )


def rows_meant(labels: Sequence[str], tables: Sequence[str], rows: Sequence[tuple[Point, RunConfig]]) -> list[str]:
    """Return those rows of tables whose recipe a study has; a study of a few recipes does not miss the others."""
    own = {recipe_name(config, stage) for _, config in rows for stage in finals_of(config)}
    recipes = [published_tables()[name].recipes for name in tables]
    return [label for label in labels if any(label in one and one[label].recipe in own for one in recipes)]


def _table(found: Sequence[tuple[Point, Published]]) -> list[str]:
    """Lay out what was published and beside which runs it will stand."""
    keys = list(dict.fromkeys(key for _, one in found for key in one.values))
    lines = [["published, %", "beside", *(_NAMES.get(key, key.replace("_", " ")) for key in keys)]]
    for point, one in found:
        values = [printed(one.values[key]) if key in one.values else "" for key in keys]
        lines.append([one.name, _unseeded(point), *values])
    return text_table(lines, left=(0, 1))


def _unseeded(point: Point) -> str:
    return point.run.removesuffix(f"-s{point.seed}")


def _files(rows: Sequence[tuple[Point, RunConfig]]) -> Iterator[str]:
    """Yield what must be fetched before the runs can start."""
    problems = list[str]()
    for point, config in rows:
        if (problem := missing_root(config.dataset)) is not None:
            problems.append(problem)
        try:
            check_sources(config, siblings_in(point.words))
        except ValueError as error:
            problems += [line.strip() for line in str(error).splitlines()]
    yield from (f"not there  {problem}" for problem in dict.fromkeys(problems))
