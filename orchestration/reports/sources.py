"""The runs of a report: those of a study, of folders that hold runs, or run folders named one by one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.config.paths import expand
from orchestration.reports.asked import Asked, asked_of
from orchestration.reports.records import LeftOut, Record, read_run
from orchestration.storage.files import CONFIG, refuse_sweep
from orchestration.storage.study_file import STUDY_FILE as STUDY
from orchestration.storage.study_file import read_study_file
from orchestration.storage.url_store import is_url

REFERENCE = "reference"
_USUAL = Path("runs")  # the usual run.dir: a study may be named alone


@dataclass
class Sources:
    """All that is read for a report.

    Attributes:
        title: name of the study, or of what was given.
        folder: where the report goes.
        records: results of finished runs, in order.
        left_out: runs that are not finished, or damaged.
        study: content of study.json; {} outside a study.
        missing: rows that cannot be trained yet, label by label, and why.
    """

    title: str
    folder: Path
    records: list[Record] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    study: Mapping[str, Any] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)

    @property
    def varied(self) -> frozenset[str]:
        """Keys of a study's labels that not all of its runs have alike."""
        labels = [point.get("label") or {} for point in self.study.get("points", ()) if point.get("role") != REFERENCE]
        keys = {key for label in labels for key in label}
        return frozenset(key for key in keys if len({label.get(key) for label in labels}) > 1)

    @property
    def asked(self) -> Asked:
        """Return the wishes of the study for its reports.

        Raises:
            ValueError: its `report` has an unknown key or value.
        """
        return asked_of(self.study.get("report"), str(self.folder.parent / STUDY))

    @property
    def axes(self) -> frozenset[str]:
        """Keys that a study gives several values, beside what its recipes say."""
        return frozenset(self.study.get("axes") or ())


def read_sources(targets: Sequence[str], out: str | None = None) -> Sources:
    """Read the results of everything that is named.

    Args:
        targets: folders of runs, of a study, or folders that hold runs.
        out: folder of the report; None for `report` beside the runs.

    Raises:
        ValueError: a target is none of these, or no run is finished.
    """
    folders = [_existing(target) for target in targets]
    found = _study(folders[0]) if len(folders) == 1 and (folders[0] / STUDY).is_file() else _runs(folders)
    if out is not None:
        found.folder = expand(out)
    if not found.records:
        raise ValueError(_nothing(targets, found.left_out))
    return found


def _existing(target: str) -> Path:
    if is_url(target):
        raise ValueError(f"{target}: a URL; a report reads folders on disk; needed a copy of the runs, or a mount")
    path = expand(target)
    if not path.exists() and (_USUAL / target / STUDY).is_file():
        return _USUAL / target
    if not path.exists():
        parent = path.parent
        names = [one.name for one in parent.iterdir() if one.is_dir()] if parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        hint = f"; did you mean {parent / near[0]}?" if near else ""
        raise ValueError(f"{target}: nothing there; needed folders of runs, or the folder of a study{hint}")
    return path


def _study(folder: Path) -> Sources:
    study = read_study_file(folder)
    found = Sources(str(study.get("name") or folder.name), folder / "report", study=study)
    found.missing = [(str(one.get("label")), str(one.get("why", ""))) for one in study.get("missing") or ()]
    for point in study.get("points") or ():
        name, state = str(point["run"]), str(point.get("status", "waiting"))
        if not (folder / name / CONFIG).is_file():
            gone = state == "finished"
            why = f"{folder / name} is not there; restore it, or repeat the study" if gone else point.get("problem")
            found.left_out.append(LeftOut(name, "gone" if gone else state, str(why or "")))
            continue
        _add(found, read_run(folder / name, point.get("label"), str(point.get("role", "run"))))
    return found


def _runs(folders: Sequence[Path]) -> Sources:
    runs: list[Path] = []
    for folder in folders:
        if (folder / CONFIG).is_file():
            runs.append(folder)
            continue
        refuse_sweep(folder)
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        if not inside:
            what = "a folder without config.yaml, and without runs in it" if folder.is_dir() else "a file"
            raise ValueError(f"{folder}: found {what}; needed the folder of a run, of a study, or one that holds runs")
        runs += inside
    parents = {run.parent for run in runs}
    one = folders[0] if len(folders) == 1 else None
    found = Sources(
        one.name if one else f"{len(runs)} runs", (parents.pop() if len(parents) == 1 else Path()) / "report"
    )
    known: dict[Path, Path] = {}
    for run in runs:
        if (earlier := known.setdefault(run.resolve(), run)) is not run:
            found.left_out.append(LeftOut(run.name, "left out", f"{run}: the same folder as {earlier}; shown once"))
            continue
        result = read_run(run)
        # A run on the balanced variant of a set is what relative accuracy needs, also outside a study.
        if isinstance(result, list) and result and result[0].config.dataset.balanced:
            result = read_run(run, role=REFERENCE)
        _add(found, result)
    return found


def _add(found: Sources, result: list[Record] | LeftOut) -> None:
    if isinstance(result, LeftOut):
        found.left_out.append(result)
    else:
        found.records += result


def _nothing(targets: Sequence[str], left_out: Sequence[LeftOut]) -> str:
    states: dict[str, int] = {}
    for one in left_out:
        states[one.state] = states.get(one.state, 0) + 1
    counted = ", ".join(f"{count} {state}" for state, count in states.items()) or "no run"
    first = next((f"; {one.run}: {one.why}" for one in left_out if one.why), "")
    return f"{' '.join(targets)}: no finished run to report on; found {counted}{first}"
