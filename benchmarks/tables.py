"""Fill the tables of docs/results.md and README.md with what the committed studies have measured.

    python -m benchmarks.tables runs ...  read the studies in these folders, keep what the tables show, fill them
    python -m benchmarks.tables           fill them with what is kept in benchmarks/results/<study>.json

The studies are files of configs/study/. Each is trained, or gone on with, by a command like

    expertail study study=fashion_mnist_lt dataset.root=<folder of the four .gz files> run.dir=runs

A study that is still being trained fills its rows with the seeds that it has; recipes without a seed are named below
its table. A study may be trained in parts, on several machines, each a study of this name with some of its recipes or
seeds: what is kept stays, and is joined with what the parts have (parts.py). Differences, and whether they are real,
are a report's own (docs/reports.md). Where seeds were joined, the bootstrap is of those whose predictions were at hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.parts import joined, made_by

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STUDIES = ("fashion_mnist_lt", "cifar10_lt", "fashion_mnist_lt_40", "classifiers")
GROUPS = ("all", "many", "medium", "few", "many_by_index", "medium_by_index", "few_by_index")
REAL = "real at 95 %"
SECOND_STAGES = ("acsl", "crt", "lws", "ncm", "tau_norm", "disalign", "dstl", "uno_ic")
NAMES = {
    "ce+joint": "ce",
    **{f"ce+{stage}": stage for stage in SECOND_STAGES},
    "gcl+joint": "gcl, first stage",
    "gcl+gcl": "gcl",
    "ce+mixup+joint": "ce+mixup",
    "ce+mixup+mislas": "mislas",
    "ce+mixup+dr": "dr_mu",
    "ce+mixup+h2t": "dr_h2t",
}
"""Recipes that a study trains as final stages of one run, by the label of their row."""
README = {
    "ce": "1", "ros": "1", "balanced_softmax": "1", "crt": "1", "bbn": "2", "reslt": "3", "ace": "3", "tade": "3",
    "ride": "3", "ride_h2t": "3", "lfme": "3, then 1",
}  # fmt: skip
"""Rows of the README's table, with their experts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of the studies")
    options = parser.parse_args()
    for runs in options.runs:
        there = [name for name in STUDIES if (runs / name / "study.json").exists()]
        if not there:
            sys.exit(f"{runs}: holds none of the studies {', '.join(STUDIES)}; needed the run.dir of them")
        for name in there:
            try:
                print(f"{name}: {keep(runs / name)} rows", flush=True)
            except ValueError as problem:
                sys.exit(f"{runs / name}: {problem}")
    for path in (ROOT / "docs" / "results.md", ROOT / "README.md"):
        path.write_text(filled_in(path.read_text(), path.name))


# What is kept


def keep(folder: Path) -> int:
    """Join what the tables show of a study with what is kept in benchmarks/results. Return the number of rows."""
    from orchestration.reports.json_file import json_text
    from orchestration.reports.report import make_report
    from orchestration.reports.sources import read_sources

    found = read_sources([str(folder)])
    record = kept(json.loads(json_text(make_report(found, print))), found.study, made_by(found.records))
    if (before := read(folder.name)) is not None:
        order = order_of(folder.name)
        record = joined(before, record, lambda label: NAMES.get(label, label), order, recipes_of)
    record["missing"] = missing_in(folder.name)
    (RESULTS / f"{folder.name}.json").write_text(as_text(record))
    return len(record["rows"])


def kept(report: Mapping[str, Any], study: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the tables show of a report; its first table is that with the baseline.

    Args:
        report: its JSON.
        study: content of its study.json.
        made: what made its runs, of `benchmarks.parts.made_by`.
    """
    tables = sorted(report["tables"], key=lambda table: table["baseline"] is None)
    have = {run["run"] for table in tables for row in table["rows"] for run in row["runs"]}
    points = [point["run"] for point in study["points"] if point["run"] not in have]
    recipes = {re.sub("-s[0-9]+$", "", run) for run in have}
    seeds = {seed for table in tables for row in table["rows"] for seed in row["seeds"]}
    return {
        "command": f"expertail study study={report['title']} dataset.root=<folder>",
        "data": tables[0]["data"],
        "schedule": tables[0]["schedule"],
        "seeds": sorted({*tables[0]["seeds"], *seeds}),
        "baseline": tables[0]["baseline"],
        "made_with": report["made_with"],
        "missing": report["missing"],
        "untrained": [one for one in dict.fromkeys(re.sub("-s[0-9]+$", "", p) for p in points) if one not in recipes],
        **made,
        "rows": [_row(row, _apart(table, tables[0])) for table in tables for row in table["rows"]],
    }


def missing_in(study: str) -> list[dict[str, str]]:
    """Return the rows that the committed study lists without a run."""
    from orchestration.studies.study_config import read_study

    return [one.model_dump() for one in read_study([f"study={study}"]).missing]


def order_of(study: str) -> list[str]:
    """Return the rows of a study as tables call them, in the order of its recipes."""
    from orchestration.studies.grid import label_of
    from orchestration.studies.study_config import read_study

    names = []
    for recipe in read_study([f"study={study}"]).recipes:
        label = label_of(recipe.words.split())
        name = recipe.label or "+".join(label[key] for key in ("method", "mix") if key in label)
        finals = label.get("then", "").strip("[]").split(",")
        names += [NAMES.get(row, row) for row in ([f"{name}+{final}" for final in finals] if finals[0] else [name])]
    return names


def _apart(table: Mapping[str, Any], first: Mapping[str, Any]) -> str | None:
    """Say why rows of a table are not compared with the first; None for the first."""
    if table is first:
        return None
    epochs = table["schedule"]["epochs"]
    schedule = [f"{epochs} epochs"] if epochs != first["schedule"]["epochs"] else []
    data = ["other images are held out"] if table["data"]["digest"] != first["data"]["digest"] else []
    return ", ".join([*schedule, *data]) or "another schedule"


def _row(row: Mapping[str, Any], apart: str | None) -> dict[str, Any]:
    top1 = {
        group: {**{key: _short(row["measures"][group][key]) for key in ("mean", "sd")},
                "by_seed": {seed: _short(value) for seed, value in row["measures"][group]["by_seed"].items()}}
        for group in GROUPS
    }  # fmt: skip
    differences = {group: {"mean": _short(one["mean"]), "words": one["words"], "over_images": _ends(one)}
                   for group, one in row.get("differences", {}).items() if group in GROUPS and not apart}  # fmt: skip
    return {
        "label": row["label"],
        "seeds": row["seeds"],
        "commits": sorted({str((run.get("adopted") or run)["commit"])[:8] for run in row["runs"]}),
        "adopted": sorted({run["adopted"]["run"] for run in row["runs"] if "adopted" in run}),
        "apart": apart,
        "top1": top1,
        "differences": differences,
        "cost": {key: row["cost"][key] for key in ("parameters", "inference", "training", "teachers")},
    }


def _ends(difference: Mapping[str, Any]) -> list[float | None] | None:
    """Return the ends of the interval over images, where there is one."""
    ends = difference.get("over_images")
    return ends and [_short(end) for end in ends]


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def as_text(record: Mapping[str, Any]) -> str:
    """Return a record as JSON with one line for each row."""
    rest = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    return f'{rest.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n'


# Tables


def table(record: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a study's table, and what is to be said below it."""
    columns = ("recipe", "all", "many > 100", "medium", "few < 20", "by index", "medium and few beyond `ce`",
               "10^6 per image", "10^12 to train")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in record["rows"]:
        index = " / ".join(percent(row["top1"][group], spread=False) for group in GROUPS[4:])
        cells = [shown(row, record, names), *accuracies(row), index, beyond(row), *costs(row["cost"])]
        yield f"| {' | '.join(cells)} |"
    yield from remarks(record, names)


def remarks(record: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """Yield what is to be said below a table, after an empty line; nothing where there is nothing to say."""
    apart: dict[str, list[str]] = {}
    for row in record["rows"]:
        if row["apart"]:
            apart.setdefault(row["apart"], []).append(in_code(names.get(row["label"], row["label"])))
    lines = [f"Not compared with `ce`: {', '.join(rows)} ({why})." for why, rows in apart.items()]
    if record["untrained"]:
        recipes = [f"`{recipe}`" for name in record["untrained"] for recipe in recipes_of(name)]
        lines.append(f"Not trained yet: {', '.join(recipes)}.")
    lines += [f"Not in the study: `{one['label']}`, since {one['why']}." for one in record["missing"]]
    if lines:
        yield ""
    for line in lines:
        yield from textwrap.wrap(line, 120, break_long_words=False, break_on_hyphens=False)


def recipes_of(run: str) -> list[str]:
    """Return the recipes that a run trains, by its name without seed: ce+crt+lws has crt and lws."""
    for host in ("ce+mixup", "ce"):
        stages = run.removeprefix(f"{host}+").split("+")
        if run.startswith(f"{host}+") and all(f"{host}+{stage}" in NAMES for stage in stages):
            return [NAMES[f"{host}+{stage}"] for stage in stages]
    return [run]


def accuracies(row: Mapping[str, Any]) -> list[str]:
    return [percent(row["top1"][group]) for group in GROUPS[:4]]


def shown(row: Mapping[str, Any], record: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return a row's label, with the number of seeds where it has not all."""
    few = len(row["seeds"]) < len(record["seeds"])
    label = in_code(names.get(row["label"], row["label"]))
    return f"{label} ({len(row['seeds'])} of {len(record['seeds'])} seeds)" if few else label


def in_code(label: str) -> str:
    """Return a label with its names as code: `ce` + `mixup`."""
    name = re.match(r"[\w+]+", label)
    head = name[0] if name else ""
    return " + ".join(f"`{part}`" for part in head.split("+")) + label.removeprefix(head)


def percent(measure: Mapping[str, Any], spread: bool = True) -> str:
    """Return a mean in percent, with its standard deviation where there is one."""
    if measure["mean"] is None:
        return "n/a"
    sd = f" ± {100 * measure['sd']:.1f}" if spread and measure["sd"] is not None else ""
    return f"{100 * measure['mean']:.1f}{sd}"


def beyond(row: Mapping[str, Any]) -> str:
    """Return by how many points a row beats the baseline, bold where the report calls it real."""
    parts = []
    for group in ("medium", "few"):
        if (one := row["differences"].get(group)) is not None:
            points = f"{100 * one['mean']:+.1f}"
            parts.append(f"**{points}**" if one["words"] == REAL else points)
    return " / ".join(parts)


def costs(cost: Mapping[str, Any]) -> list[str]:
    each = "n/a" if cost["inference"] is None else f"{cost['inference'] / 1e6:.1f}"
    training = "n/a" if cost["training"] is None else f"{cost['training'] / 1e12:.2f}"
    return [each, f"{training} and the teacher" if cost["teachers"] else training]


def readme_table(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the README's table: some rows, the highest mean of each column over all seeds in bold."""
    rows = {NAMES.get(row["label"], row["label"]): row for row in record["rows"]}
    there = {label: rows[label] for label in README if label in rows}
    whole = [row for row in there.values() if len(row["seeds"]) == len(record["seeds"]) and not row["apart"]]
    best = {group: max((row["top1"][group]["mean"] for row in whole), default=None) for group in GROUPS[:4]}
    yield "| method | experts | all | many | medium | few |"
    yield "|---" * 6 + "|"
    for label, row in there.items():
        bold = [row in whole and row["top1"][group]["mean"] == best[group] for group in GROUPS[:4]]
        cells = [f"**{cell}**" if top else cell for cell, top in zip(accuracies(row), bold, strict=True)]
        few = "" if len(row["seeds"]) == len(record["seeds"]) else f" (n={len(row['seeds'])})"
        note = f" ({row['apart']})" if row["apart"] else few
        yield f"| `{label.partition(',')[0]}`{note} | {README[label]} | {' | '.join(cells)} |"


# Documents


def read(name: str) -> dict[str, Any] | None:
    """Return what is kept of a study; None where nothing is."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def filled_in(text: str, document: str) -> str:
    """Return a document with its tables filled."""
    found = {name: record for name in STUDIES if (record := read(name))}
    if document == "README.md":
        tables = {"readme": readme_table(found[STUDIES[0]])} if STUDIES[0] in found else {}
    else:
        plain = dict[str, str]()
        tables = {name: table(record, plain if name == "classifiers" else NAMES) for name, record in found.items()}
    return between_marks(text, {name: list(lines) for name, lines in tables.items()}, document)


def between_marks(text: str, tables: Mapping[str, Sequence[str]], document: str, kind: str = "table") -> str:
    """Put tables into a document, between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the document has no such lines for a table.
    """
    for name, lines in tables.items():
        start, end = f"<!-- {kind}: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(f"{document}: found no lines '{start.strip()}' and '{end}'; needed both")
        body = "\n".join(lines)
        text = f"{before}{start}\n{body}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    main()
