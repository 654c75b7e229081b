"""The report as CSV: a line per row of every table, numbers in full, accuracies in percent as in the tables."""

from __future__ import annotations

import csv
import io

from orchestration.reports.compare import COMPARED
from orchestration.reports.report import Report, Section
from orchestration.reports.rows import Row
from orchestration.reports.statistics import Interval

_OTHERS = {"nll": 1.0, "ece": 100.0, "worst": 100.0, "balanced": 100.0, "macro_f1": 100.0, "top5": 100.0}


def csv_text(report: Report) -> str:
    """Return the whole report; what is missing is an empty cell."""
    lines = [_line(report, section, row) for section in report.sections for row in section.table.rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _line(report: Report, section: Section, row: Row) -> dict[str, str | int | float | None]:
    table, cost = section.table, section.costs[row.label]
    line: dict[str, str | int | float | None] = {
        "table": table.number, "recipe": row.label, "n": len(row.seeds), "seeds": " ".join(map(str, row.seeds)),
        "model": report.which, "data": table.data.name, "digest": table.data.digest,
        **table.schedule._asdict(),
    }  # fmt: skip
    for key, scale in {**dict.fromkeys(COMPARED, 100.0), **_OTHERS}.items():
        mean, sd = row.spread(key, report.which)
        line |= {f"{key}/mean": _scaled(mean, scale), f"{key}/sd": _scaled(sd, scale)}
    for key in COMPARED:
        one = section.difference(row.label, key)
        line[f"{key}/difference"] = _scaled(one.mean if one else None)
        for name, interval in (
            ("seeds", one.over_seeds if one else None),
            ("images", one.over_images if one else None),
        ):
            line |= _ends(f"{key}/{name}", interval)
        line[f"{key}/words"] = one.words if one else None
    for key in ("all", "few"):
        mean, _ = row.spread(key, "best")
        line[f"best/{key}/mean"] = _scaled(mean)
    chosen = sorted({model.selected_on or "" for model in row.models("best").values()})
    line |= {"best/chosen_on": " ".join(chosen)}
    if published := section.published.get(row.label):
        line |= {"published/table": published.table, "published/row": published.row}
        line |= {f"published/{measure}": value for measure, value in published.values.items()}
    if found := section.relative.get(row.label):
        for name in ("vanilla", "own", "upper", "relative"):
            mean, sd = getattr(found, name)
            line |= {f"relative/{name}/mean": _scaled(mean), f"relative/{name}/sd": _scaled(sd)}
    return line | {
        "parameters": cost.parameters, "multiply_adds_per_image": cost.inference,
        "training_multiply_adds": cost.training, "worker_hours": cost.worker_hours, "gpu_hours": cost.gpu_hours,
    }  # fmt: skip


def _scaled(value: float | None, scale: float = 100.0) -> float | None:
    return None if value is None else scale * value


def _ends(name: str, interval: Interval | None) -> dict[str, str | int | float | None]:
    return {f"{name}/low": _scaled(interval.low if interval else None),
            f"{name}/high": _scaled(interval.high if interval else None)}  # fmt: skip
