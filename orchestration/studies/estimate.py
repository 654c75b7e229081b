"""The text of `expertail study --plan`: runs, places, hours, storage. Nothing is started.

Hours and storage are those of runs that are finished, so that they hold for this recipe, data and machine. Before the
first is finished, they are said to be unknown: `expertail plan --probe` of one run measures the hours.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experts.data.cpus import usable_cpus
from orchestration.cluster.placement import Resources
from orchestration.results.text import bytes_, duration, plural, text_table
from orchestration.storage.files import read_json
from orchestration.studies.adoption import Adoption
from orchestration.studies.beside import beside_lines
from orchestration.studies.grid import Grid
from orchestration.studies.points import Point
from orchestration.studies.run_queue import FAILED, FINISHED
from orchestration.studies.side_by_side import room
from orchestration.studies.study_folder import StudyFolder

_UNKNOWN = "not known until one run is finished"
_THIS_MACHINE = "this machine"


def plan_lines(
    grid: Grid, folder: StudyFolder, nodes: Mapping[str, Resources] | None, adoption: Adoption | None = None
) -> Iterator[str]:
    """Yield what a study would train.

    Args:
        grid: of the study.
        folder: of it; it need not exist.
        nodes: resources by node; None: our own Ray on this machine.
        adoption: runs from elsewhere that would be taken over.
    """
    there = folder.finished()
    known = [one for one in (folder.records if folder.content else []) if one["status"] != FINISHED or one in there]
    status = {one["identity"]: (one["status"], one["run"]) for one in known}
    names = {one["identity"]: one["run"] for one in (folder.records if folder.content else [])}
    again = grid.study.retry == "failed"
    done = [point for point in grid.points if status.get(point.identity, ("",))[0] == FINISHED]
    taken = adoption.taken if adoption else {}
    failed = [p for p in grid.points if status.get(p.identity, ("",))[0] == FAILED and not again and p.run not in taken]
    status |= {point.identity: ("to take over", point.run) for point in grid.points if point.run in taken}
    left = [p for p in grid.points if p not in done and p not in failed and p.run not in taken]
    references = sum(point.role == "reference" for point in grid.points)

    yield f"study {grid.name}: {grid.folder}"
    yield ""
    rows = [["run", "state", "words"]]
    for point in grid.points:
        state = status.get(point.identity, ("to train",))[0]
        rows.append([names.get(point.identity, point.run), state, " ".join(_own(point, grid))])
    yield from text_table(rows, left=(0, 1, 2))
    yield ""
    parts = [
        f"{len(done)} finished",
        *([f"{len(failed)} failed, which stay so without study.retry=failed"] if failed else []),
        *([f"{len(taken)} to take over"] if taken else []),
        f"{len(left)} to train",
    ]
    of_them = f", {references} of them references on balanced data" if references else ""
    yield f"runs      {plural(len(grid.points), 'run')}{of_them}: {', '.join(parts)}"
    if shared := _shared(left):
        yield f"stages    {shared} that several runs begin with are trained once"
    if adoption and adoption.lent:
        lent, lenders = plural(len(adoption.lent), "stage"), plural(len(set(adoption.lent.values())), "run")
        yield f"lent      {lent}, trained by {lenders} elsewhere"
    yield from (f"adopt     {line}" for line in (adoption.lines if adoption else ()))
    resources = nodes if nodes is not None else {_THIS_MACHINE: {"CPU": float(usable_cpus())}}
    at_once = min(room(resources, left), len(left)) if left else 0
    most = at_once if grid.study.parallel == "auto" else min(at_once, grid.study.parallel)
    where = plural(len(nodes), "node") if nodes is not None else _THIS_MACHINE
    if left:
        yield f"places    {most} at once on {where}"
    measured = [_measured(grid.folder / status[point.identity][1]) for point in done]
    yield f"hours     {_hours(measured, left, most)}"
    yield f"storage   {_storage(measured, len(left))}"
    yield from beside_lines(grid)


def _own(point: Point, grid: Grid) -> list[str]:
    return [word for word in point.words if word not in grid.study.words and not word.startswith("cluster.cpus_per")]


def _shared(points: Sequence[Point]) -> int:
    """Count the stages that are trained once for several runs."""
    digests = [digest for point in points for digest in point.stages.values()]
    return len({digest for digest in digests if digests.count(digest) > 1})


def _measured(folder: Path) -> tuple[float | None, int]:
    """Return how long a finished run took, seconds, and the bytes of its folder."""
    run: dict[str, Any] = read_json(folder / "run.json")
    hours, workers = (run.get("cost") or {}).get("worker_hours"), len(run.get("workers") or [1])
    return None if hours is None else hours * 3600 / workers, sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file()
    )


def _hours(measured: Sequence[tuple[float | None, int]], points: Sequence[Point], at_once: int) -> str:
    known, left = [seconds for seconds, _ in measured if seconds], len(points)
    if not left:
        return "none"
    if not known:
        return f"{_UNKNOWN}; measured for one by: expertail plan --probe {shlex.join(points[0].words)}"
    mean = sum(known) / len(known)
    return (
        f"about {duration(mean * left / max(at_once, 1))}, by {plural(len(known), 'finished run')} of {duration(mean)}"
    )


def _storage(measured: Sequence[tuple[float | None, int]], left: int) -> str:
    if not measured:
        return _UNKNOWN
    mean = sum(size for _, size in measured) / len(measured)
    return f"about {bytes_(round(mean * left))} more, by {bytes_(round(mean))} of a finished run"
