"""The rows of a study: its runs that differ in nothing but their seed. Each row is a parent run in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.storage.study_file import read_study_file
from orchestration.tracking.contents import overall_status
from orchestration.tracking.headline import headline, mean_and_spread


@dataclass(frozen=True)
class StudyRow:
    """One row.

    Attributes:
        name: that its runs have in common, as ride-ratio50; no other row has it.
        label: pairs of key and value that make it differ from others, as study.json has them.
        role: "run", or "reference".
        runs: seeds by name of run, in the order of the study.
        status: running, finished, failed or stopped, as a whole.
    """

    name: str
    label: Mapping[str, str]
    role: str
    runs: Mapping[str, int]
    status: str

    def summary(self, folder: Path) -> tuple[dict[str, float], list[int]]:
        """Return mean and spread of the headline metrics of its finished runs, and the seeds of these.

        Args:
            folder: of the study.

        Raises:
            ValueError: a file of a run is damaged.
        """
        found = {seed: metrics for run, seed in self.runs.items() if (metrics := headline(folder / run))}
        return mean_and_spread(found.values()), sorted(found)


def rows_of(study: Mapping[str, Any]) -> list[StudyRow]:
    """Return the rows of a study, in its order.

    Args:
        study: content of study.json.
    """
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in study.get("points", ()):
        key = (point.get("role", "run"), *sorted((point.get("label") or {}).items()))
        grouped.setdefault(key, []).append(point)
    rows, names = [], set[str]()
    for points in grouped.values():
        first = points[0]
        name = first["run"].removesuffix(f"-s{first.get('seed')}")
        # Runs keep their names when a study grows, so that two rows may begin alike.
        name = name if name not in names else first["run"]
        names.add(name)
        runs = {point["run"]: point.get("seed", number) for number, point in enumerate(points)}
        rows.append(StudyRow(name, first.get("label") or {}, first.get("role", "run"), runs, overall_status(points)))
    return rows


def row_of(run_dir: Path) -> StudyRow | None:
    """Return the row of a run, by the study.json in the folder around it; None where it is in no study."""
    study = read_study_file(run_dir.parent)
    return next((row for row in rows_of(study) if run_dir.name in row.runs), None)
