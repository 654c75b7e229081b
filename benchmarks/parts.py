"""Join what is kept of a study with what a further part of it has measured: trained later, or on another machine.

    kept, part -> rows by name, their seeds united; what both have must agree
               -> differences to the baseline, where seeds have come to a row or to the baseline
               -> what made each run, and what is untrained still
A part may be joined again when it has grown.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestration.reports.compare import verdict
from orchestration.reports.records import Record
from orchestration.reports.report import provenance
from orchestration.reports.statistics import Interval, mean_and_sd, paired_interval

Kept = dict[str, Any]
"""What benchmarks/results/<study>.json holds; `benchmarks.tables.kept` makes it."""
_DIGITS = 6


def made_by(records: Sequence[Record]) -> Kept:
    """Return what made each run: `runs`, a key of `makers` by run, and `makers`, a commit, versions, machine, data."""
    runs, makers = dict[str, str](), dict[str, dict[str, str]]()
    for record in records:
        maker = {kind: next(iter(counts)) for kind, counts in provenance([record]).items()}
        key = hashlib.sha256(json.dumps(maker).encode()).hexdigest()[:8]
        runs[record.run], makers[key] = key, maker
    return {"runs": runs, "makers": makers}


def made_with(kept: Kept) -> Kept:
    """Count the runs of each commit, machine and so on; `made_before` has those of runs whose makers were not kept."""
    found: Kept = {kind: dict(counts) for kind, counts in kept.get("made_before", {}).items()}
    for key in kept["runs"].values():
        for kind, what in kept["makers"][key].items():
            counts = found.setdefault(kind, {})
            counts[what] = counts.get(what, 0) + 1
    return found


def joined(
    kept: Kept,
    part: Kept,
    name_of: Callable[[str], str],
    order: Sequence[str],
    names_of: Callable[[str], Sequence[str]] = lambda run: [run],
) -> Kept:
    """Return what is kept of a study with a further part of it.

    Args:
        kept: of the study.
        part: of some of its recipes and seeds.
        name_of: returns what a label is shown as; rows of one name are one row.
        order: the names, in the order in which rows come.
        names_of: returns the names of the rows that a run trains, by its name without seed.

    Raises:
        ValueError: the part is of other data or another schedule, or a seed of both has another accuracy.
    """
    for key in ("data", "schedule"):
        if kept[key] != part[key]:
            raise ValueError(f"{part['command']}: its {key} is {part[key]}; kept is {kept[key]}; needed the same")
    before = {_key(row, name_of): row for row in kept["rows"]}
    rows = dict(before)
    for row in part["rows"]:
        key = _key(row, name_of)
        rows[key] = _row(before[key], row) if key in before else row

    baseline = kept["baseline"] or part["baseline"]
    base_key = (name_of(baseline), None) if baseline else None
    for key, row in rows.items():
        new_seeds = any(_seeds(rows, one) != _seeds(before, one) for one in (key, base_key))
        if new_seeds and base_key in rows and key != base_key and not row["apart"]:
            rows[key] = {**row, "differences": _differences(row, rows[base_key])}
    found = {
        **kept,
        "seeds": sorted({*kept["seeds"], *part["seeds"]}),
        "baseline": baseline,
        "untrained": _untrained([*kept["untrained"], *part["untrained"]], [name for name, _ in rows], names_of),
        "made_before": kept.get("made_before", {}) if "runs" in kept else kept["made_with"],
        "runs": {**kept.get("runs", {}), **part["runs"]},
        "makers": {**kept.get("makers", {}), **part["makers"]},
    }
    position = {name: place for place, name in enumerate(order)}
    ordered = sorted(rows, key=lambda key: (key[1] is not None, position.get(key[0], len(position))))
    return {**found, "made_with": made_with(found), "rows": [rows[key] for key in ordered]}


def _seeds(rows: Mapping[Any, Kept], key: Any) -> list[int]:
    return rows[key]["seeds"] if key in rows else []


def _key(row: Kept, name_of: Callable[[str], str]) -> tuple[str, str | None]:
    return name_of(row["label"]), row["apart"]


def _row(old: Kept, new: Kept) -> Kept:
    """Return a row with the seeds of both."""
    measures = {group: _united(old, new, group) for group in old["top1"]}
    lists = {key: sorted({*old[key], *new[key]}) for key in ("seeds", "commits", "adopted")}
    # A bootstrap is of models at hand: that of the part, or else the kept one.
    return {**old, **lists, "top1": measures, "differences": {**old["differences"], **new["differences"]}}


def _united(old: Kept, new: Kept, group: str) -> Kept:
    """Return a measure over the seeds of both rows.

    Raises:
        ValueError: they differ in a seed.
    """
    ours, theirs = old["top1"][group]["by_seed"], new["top1"][group]["by_seed"]
    for seed in ours.keys() & theirs.keys():
        if ours[seed] != theirs[seed]:
            raise ValueError(
                f"{new['label']}, seed {seed}, {group}: found {theirs[seed]}, kept is {ours[seed]}, of commits "
                f"{', '.join(old['commits'])}; needed the same; remove what is kept to begin from nothing"
            )
    by_seed = dict(sorted({**ours, **theirs}.items(), key=lambda item: int(item[0])))
    known = [value for value in by_seed.values() if value is not None]
    mean, sd = mean_and_sd(known if len(known) == len(by_seed) else [])
    return {"mean": _short(mean), "sd": _short(sd), "by_seed": by_seed}


def _differences(row: Kept, base: Kept) -> Kept:
    """Return the differences of a row to the baseline over the seeds that both have, with the words of a report."""
    found = {}
    for group, measure in row["top1"].items():
        ours, theirs = measure["by_seed"], base["top1"][group]["by_seed"]
        both = [seed for seed in ours if seed in theirs and None not in (ours[seed], theirs[seed])]
        if not both:
            continue
        differences = [ours[seed] - theirs[seed] for seed in both]
        mean, _ = mean_and_sd(differences)
        ends = row["differences"].get(group, {}).get("over_images")
        words = verdict(len(both), paired_interval(differences), ends and Interval(0.0, *ends))
        found[group] = {"mean": _short(mean), "words": words, "over_images": ends}
    return found


def _untrained(runs: Sequence[str], names: Sequence[str], names_of: Callable[[str], Sequence[str]]) -> list[str]:
    """Return the names of runs, without their seeds, that no row comes from."""
    trained = set(map(_plain, names))
    return [run for run in dict.fromkeys(runs) if not trained.intersection(map(_plain, names_of(run)))]


def _plain(name: str) -> str:
    """Return a name as folders have it."""
    return re.sub(r"[^\w.+-]+", "_", name)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
