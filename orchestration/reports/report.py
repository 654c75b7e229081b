"""A report: everything that is shown of many runs, computed once; writers lay it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.reports.across import Across, across
from orchestration.reports.compare import Comparison, Difference, baseline_of, compare, compare_two
from orchestration.reports.cost import Cost, Costs
from orchestration.reports.published import Published, published_for
from orchestration.reports.records import BY_COUNT, BY_INDEX, LeftOut, Record
from orchestration.reports.relative import Relative, relative_accuracies
from orchestration.reports.rows import Row, Table, apart_lines, tables
from orchestration.reports.sources import REFERENCE, Sources
from orchestration.results.text import decimals, plural

_EQUAL_COST = 1.1
"""Multiply-adds of a row, in training and inference, over the baseline's, up to which they cost the same."""


@dataclass(frozen=True)
class Section:
    """One table with all that is computed from it.

    Attributes:
        table: its rows.
        comparison: differences to the baseline; None where the table has no such row.
        relative: relative accuracy by label, of rows that have references.
        costs: by label.
        published: by label, of rows that meet the conditions of a published result.
        seeds: that a row should have.
        answers: sentences that say what is best.
    """

    table: Table
    comparison: Comparison | None
    relative: Mapping[str, Relative]
    costs: Mapping[str, Cost]
    published: Mapping[str, Published]
    seeds: tuple[int, ...]
    answers: tuple[str, ...]

    @property
    def measures(self) -> tuple[str, ...]:
        """Accuracies that exist here: all, and the groups of both rules that have a class."""
        return ("all", *(key for key in (*BY_COUNT, *BY_INDEX) if self.table.data.groups.get(key)))

    @property
    def rarest(self) -> str:
        """The measure of the rarest classes that there is: few by count, few by index, or all."""
        return rarest(self.table)

    def difference(self, label: str, key: str) -> Difference | None:
        """Return the difference of a row to the baseline; None of the baseline itself."""
        return None if self.comparison is None else self.comparison.differences.get(label, {}).get(key)


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Attributes:
        title: name of the study or folder.
        which: "last" or "best", the models that are shown.
        sections: one per table.
        remarks: why tables are apart, what could not be used.
        left_out: runs that are not shown.
        missing: rows that cannot be trained yet, and why.
        provenance: commits, versions, hardware, digests of data, with the number of runs of each.
        across: what a study varies across tables.
    """

    title: str
    which: str
    sections: tuple[Section, ...]
    remarks: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    missing: tuple[tuple[str, str], ...]
    provenance: Mapping[str, Mapping[str, int]]
    across: tuple[Across, ...] = ()

    @property
    def model_line(self) -> str:
        """Which models are shown, and what to think of them."""
        if self.which == "last":
            return "last epoch of every run: no test image chose anything"
        chosen = {model.selected_on for section in self.sections for row in section.table.rows
                  for model in row.models("best").values() if model.selected_on}  # fmt: skip
        if "test" in chosen:
            return "the epoch that was best on TEST: optimistic, for comparison with papers that do so"
        return f"the epoch that was best on {', '.join(sorted(chosen)) or 'nothing: there was nothing to choose'}"


def make_report(found: Sources, say: Callable[[str], None], baseline: str | None = None, which: str = "last") -> Report:
    """Compute everything that is shown of some runs.

    Args:
        found: the runs.
        say: takes a line where something cannot be shown.
        baseline: label of the row to compare with; None for that of the study, or the first.
        which: "last" or "best", the models to show.

    Raises:
        ValueError: no table has the baseline.
    """
    shown = [record for record in found.records if record.role != REFERENCE]
    references = [one for one in found.records if one.role == REFERENCE or one.config.dataset.balanced]
    # Of references alone there is a table all the same: somebody asked for it.
    all_tables, doubles = tables(shown or references, found.varied, found.axes)
    asked = baseline if baseline is not None else found.study.get("baseline")
    bases = {table.number: baseline_of(table, asked) for table in all_tables}
    if baseline is not None and not any(bases.values()):  # that of a study may have no finished run yet
        labels = list(dict.fromkeys(row.label for table in all_tables for row in table.rows))
        raise ValueError(f"--baseline {asked}: no such row; needed one of: {'; '.join(labels)}")
    costs = Costs(say, found.folder, found.records)
    sections = tuple(_section(table, bases[table.number], references, costs, which, found) for table in all_tables)
    remarks = apart_lines(all_tables)
    remarks += [
        f"table {number}: the baseline {asked} is not in it, or not finished; no differences"
        for number, one in bases.items()
        if not one
    ]
    remarks += list(dict.fromkeys(line for one in sections if one.comparison for line in one.comparison.remarks))
    return Report(
        found.title, which, sections, tuple(remarks), (*found.left_out, *doubles), tuple(found.missing),
        provenance(found.records), tuple(across(all_tables, found.axes, found.varied)),
    )  # fmt: skip


def _section(
    table: Table, base: str | None, references: Sequence[Record], costs: Costs, which: str, found: Sources
) -> Section:
    comparison = compare(table, base, which) if base is not None and len(table.rows) > 1 else None
    own = {row.label: costs.of(row) for row in table.rows}
    relative = relative_accuracies(table, references, which)
    return Section(
        table, comparison, relative, own, _published(table, found.asked.tables), _seeds(table, found.study),
        tuple(_answers(table, comparison, own, which)),
    )  # fmt: skip


def _published(table: Table, names: Sequence[str] | None) -> dict[str, Published]:
    """Return what was published for the rows that meet its conditions; of some tables alone where a study names any."""
    found = {row.label: published_for(row.config, row.records[0].stage, names) for row in table.rows}
    return {label: one for label, one in found.items() if one is not None}


def _seeds(table: Table, study: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the seeds that a row should have: the study's, else those that most rows have."""
    if study.get("seeds"):
        return tuple(study["seeds"])
    return Counter(row.seeds for row in table.rows).most_common(1)[0][0]


# Answers


def rarest(table: Table) -> str:
    """Return the measure of the rarest classes that a table has."""
    return next((key for key in ("few", "few_by_index") if table.data.groups.get(key)), "all")


def _answers(table: Table, comparison: Comparison | None, costs: Mapping[str, Cost], which: str) -> list[str]:
    """Say which row is best on the rarest classes and over all, how surely, and which is at the baseline's cost."""
    if len(table.rows) < 2:
        return []
    lines = []
    for key in dict.fromkeys((rarest(table), "all")):
        ranked = _ranked(table.rows, key, which)
        if ranked:
            price = _price(costs, ranked[0].label, comparison)
            lines.append(f"Best {_in_words(key)}: {_best(table, ranked, key, comparison, which, price)}")
    if comparison is not None:
        key = rarest(table)
        equal = [row for row in table.rows if _costs_as(costs[row.label], costs[comparison.baseline])]
        ranked = _ranked(equal, key, which)
        if ranked and len(equal) < len(table.rows):
            lines.append(
                f"Best {_in_words(key)} at the cost of {comparison.baseline} (multiply-adds of training and inference "
                f"within {100 * (_EQUAL_COST - 1):.0f} %: {len(equal)} of {len(table.rows)} recipes): "
                f"{_best(table, ranked, key, comparison, which)}"
            )
    return lines


def _ranked(rows: Sequence[Row], key: str, which: str) -> list[Row]:
    """Return the rows that have a measure, the highest mean first."""
    means = {row.label: row.spread(key, which)[0] for row in rows}
    known = [row for row in rows if means[row.label] is not None]
    return sorted(known, key=lambda row: -(means[row.label] or 0.0))


def _best(
    table: Table, ranked: Sequence[Row], key: str, comparison: Comparison | None, which: str, price: str = ""
) -> str:
    """Describe the first of ranked rows, its difference to the baseline, at a price, and to the second."""
    first = ranked[0]
    text = f"{first.label} {spread_text(first.spread(key, which))} (n = {len(first.seeds)})"
    difference = comparison.differences.get(first.label, {}).get(key) if comparison else None
    if comparison and difference:
        text += f", {100 * difference.mean:+.1f} points to {comparison.baseline}{price}: {difference.words}"
    if len(ranked) > 1:
        second = ranked[1]
        text += f"; then {second.label} {spread_text(second.spread(key, which))}"
        if not (comparison and difference and second.label == comparison.baseline):  # that is said already
            apart = compare_two(table, first, second, key, which)
            behind = f", {100 * apart.mean:.1f} points behind: {apart.words}" if apart else ": no seed in common"
            text += behind
    return f"{text}."


def _price(costs: Mapping[str, Cost], label: str, comparison: Comparison | None) -> str:
    """Say for how many times the baseline's training a row is had; nothing where that is not known."""
    if comparison is None:
        return ""
    own, base = costs[label].training, costs[comparison.baseline].training
    if not own or not base:
        return ""
    times, more = f"{own / base:.2g}", ", teachers not counted" if costs[label].teachers else ""
    return f" for {'as much training' if times == '1' else f'{times} times its training'}{more}"


def _costs_as(one: Cost, base: Cost) -> bool:
    pairs = ((one.training, base.training), (one.inference, base.inference))
    return all(a is not None and b is not None and a <= _EQUAL_COST * b for a, b in pairs)


def _in_words(key: str) -> str:
    return {"all": "over all", "few": "on few-shot classes", "few_by_index": "on the rarest classes by index"}[key]


def spread_text(spread: tuple[float | None, float | None], scale: float = 100.0, digits: int = 1) -> str:
    """Return a mean and its standard deviation as text: 37.6 ± 1.6."""
    mean, sd = spread
    if mean is None:
        return "n/a"
    return decimals(mean, scale, digits) + (f" ± {decimals(sd, scale, digits)}" if sd is not None else "")


def provenance(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Return what the runs were made with, and how many runs of each."""
    runs = {record.folder: record for record in records}.values()
    found: dict[str, Counter[str]] = {name: Counter() for name in ("commit", "versions", "hardware", "data")}
    for record in runs:
        facts = record.facts
        host, mesh = facts.get("host") or {}, facts.get("mesh") or {}
        workers = mesh.get("slots", 1) * mesh.get("replicas", 1)
        devices = {str(worker.get("device", "GPU")) for worker in facts.get("workers") or ()} or {"GPU"}
        gpu = f"with {', '.join(sorted(devices))}" if record.config.cluster.gpus_per_worker else "without GPU"
        found["commit"][str(facts.get("commit"))] += 1
        found["versions"][", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items())] += 1
        machine = f"{host.get('processor', 'unknown')}, {host.get('cpus', '?')} CPUs"
        found["hardware"][f"{machine}; {plural(workers, 'worker')} {gpu}"] += 1
        found["data"][f"{record.data.name} {record.data.digest}"] += 1
        if adopted := facts.get("adopted"):  # the folder alone: its runs may be many
            found.setdefault("taken over from", Counter())[Path(adopted["folder"]).name] += 1
    return {name: dict(counts.most_common()) for name, counts in found.items()}
