"""Join what is kept of a study with what a further part of it has measured: trained later, or on another machine.

kept, part -> rows by label, their seeds united, seeds of both compared
           -> differences to the baseline anew where seeds have come to a row or to the baseline
           -> what made them, and what is untrained still
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestration.reports.compare import verdict
from orchestration.reports.statistics import Interval, mean_and_sd, paired_interval

Record = dict[str, Any]
_DIGITS = 6


def joined(kept: Record, part: Record, name_of: Callable[[str], str], order: Sequence[str]) -> Record:
    """Return what is kept of a study with a further part of it.

    Args:
        kept: as `benchmarks.tables.kept` returns it.
        part: the same of the part.
        name_of: returns what a label is shown as; rows of one name are one row.
        order: the names, in the order in which rows come.

    Raises:
        ValueError: the part is of other data or another schedule, or a seed of both has another accuracy.
    """
    for key in ("data", "schedule"):
        if kept[key] != part[key]:
            raise ValueError(f"{part['command']}: its {key} is {part[key]}; kept is {kept[key]}; needed the same")
    rows = {_key(row, name_of): row for row in kept["rows"]}
    old = dict(rows)
    for row in part["rows"]:
        key = _key(row, name_of)
        rows[key] = _row(old[key], row) if key in old else row
    seeds = sorted({*kept["seeds"], *part["seeds"]})
    baseline = name_of(kept["baseline"]), None
    for key, row in rows.items():
        if key == baseline or row["apart"]:
            continue
        if key not in old or row["seeds"] != old[key]["seeds"] or rows[baseline]["seeds"] != old[baseline]["seeds"]:
            rows[key] = {**row, "differences": _differences(row, rows[baseline])}
    position = {name: place for place, name in enumerate(order)}
    ordered = sorted(rows, key=lambda key: (key[1] is not None, position.get(key[0], len(position))))
    return {
        **kept,
        "seeds": seeds,
        "made_with": _counts(kept["made_with"], part["made_with"]),
        "missing": part["missing"],
        "untrained": [run for run in kept["untrained"] if run not in part["trained"]],
        "trained": sorted({*kept.get("trained", ()), *part["trained"]}),
        "rows": [rows[key] for key in ordered],
    }


def _key(row: Record, name_of: Callable[[str], str]) -> tuple[str, str | None]:
    return name_of(row["label"]), row["apart"]


def _row(old: Record, new: Record) -> Record:
    """Return a row with the seeds of both."""
    measures = {group: _united(old, new, group) for group in old["top1"]}
    lists = {key: sorted({*old[key], *new[key]}) for key in ("seeds", "commits", "adopted")}
    # A bootstrap is of models at hand: that of the part, or else the kept one.
    return {**old, **lists, "top1": measures, "differences": {**old["differences"], **new["differences"]}}


def _united(old: Record, new: Record, group: str) -> Record:
    """Return a measure over the seeds of both rows.

    Raises:
        ValueError: they differ in a seed.
    """
    ours, theirs = old["top1"][group]["by_seed"], new["top1"][group]["by_seed"]
    for seed in ours.keys() & theirs.keys():
        if ours[seed] != theirs[seed]:
            raise ValueError(
                f"{new['label']}, seed {seed}, {group}: found {theirs[seed]}, kept is {ours[seed]}, of commits "
                f"{', '.join(old['commits'])}; needed the same; remove what is kept to begin anew"
            )
    by_seed = dict(sorted({**ours, **theirs}.items(), key=lambda item: int(item[0])))
    known = [value for value in by_seed.values() if value is not None]
    mean, sd = mean_and_sd(known if len(known) == len(by_seed) else [])
    return {"mean": _short(mean), "sd": _short(sd), "by_seed": by_seed}


def _differences(row: Record, base: Record) -> Record:
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
        images = ends and Interval(0.0, *ends)
        words = verdict(len(both), paired_interval(differences), images)
        found[group] = {"mean": _short(mean), "words": words, "over_images": ends}
    return found


def _counts(ours: Mapping[str, Mapping[str, int]], theirs: Mapping[str, Mapping[str, int]]) -> Record:
    """Return the number of runs that each version, machine and so on has made, of both."""
    found: Record = {}
    for kind in {**ours, **theirs}:
        total = dict(ours.get(kind, {}))
        for what, count in theirs.get(kind, {}).items():
            total[what] = total.get(what, 0) + count
        found[kind] = total
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
