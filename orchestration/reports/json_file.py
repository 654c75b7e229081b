"""The report as JSON: every number in full, as fractions, each seed's too, and what the runs were made with."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from orchestration.reports.compare import COMPARED
from orchestration.reports.records import Record
from orchestration.reports.report import Report, Section
from orchestration.reports.rows import Row

SCHEMA = 1
_MEASURES = (*COMPARED, "nll", "ece", "worst", "balanced", "macro_f1", "top5")


def json_text(report: Report) -> str:
    """Return the whole report. The same runs give the same text."""
    content = {
        "schema": SCHEMA,
        "title": report.title,
        "model": report.which,
        "remarks": report.remarks,
        "tables": [_table(report, section) for section in report.sections],
        "left_out": [one.__dict__ for one in report.left_out],
        "missing": [{"label": label, "why": why} for label, why in report.missing],
        "made_with": report.provenance,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _table(report: Report, section: Section) -> dict[str, Any]:
    data = section.table.data
    return {
        "number": section.table.number,
        "data": {"name": data.name, "digest": data.digest, "classes": len(data.counts), "images": sum(data.counts),
                 "group_sizes": {key: len(ids) for key, ids in data.groups.items()}},
        "schedule": section.table.schedule._asdict(),
        "seeds": section.seeds,
        "baseline": section.comparison.baseline if section.comparison else None,
        "answers": section.answers,
        "rows": [_row(report, section, row) for row in section.table.rows],
    }  # fmt: skip


def _row(report: Report, section: Section, row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {
        "label": row.label,
        "parts": row.records[0].label,
        "seeds": row.seeds,
        "runs": [{"run": record.run, "stage": record.final, "seed": record.seed, "commit": record.facts.get("commit"),
                  "config_hash": record.facts.get("config_hash"), **_from_elsewhere(record)} for record in row.records],
        "measures": {key: _measure(row, key, report.which) for key in _MEASURES},
        "best": {key: _measure(row, key, "best") for key in COMPARED},
        "best_chosen_on": {model.selected_on for model in row.models("best").values()},
        "cost": asdict(section.costs[row.label]),
        "published": asdict(one) if (one := section.published.get(row.label)) else None,
    }  # fmt: skip
    found["best_chosen_on"] = sorted(map(str, found["best_chosen_on"]))
    if section.comparison:
        own = section.comparison.differences.get(row.label, {})
        found["differences"] = {key: _difference(one) for key, one in own.items()}
    if relative := section.relative.get(row.label):
        found["relative"] = {name: {"mean": mean, "sd": sd} for name, (mean, sd) in relative.__dict__.items()}
    return found


def _from_elsewhere(record: Record) -> dict[str, Any]:
    """Return the run that this one was taken over from, and those that its stages were."""
    return {key: record.facts[key] for key in ("adopted", "stages_taken") if record.facts.get(key)}


def _measure(row: Row, key: str, which: str) -> dict[str, Any]:
    mean, sd = row.spread(key, which)
    return {"mean": mean, "sd": sd, "by_seed": row.values(key, which)}


def _difference(one: Any) -> dict[str, Any]:
    ends = {name: interval and [interval.low, interval.high]
            for name, interval in (("over_seeds", one.over_seeds), ("over_images", one.over_images))}  # fmt: skip
    return {"mean": one.mean, "seeds": one.seeds, **ends, "words": one.words}
