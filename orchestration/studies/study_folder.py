"""The folder of a study: study.json, its lock, and the folders of its runs.

study.json is the truth about which runs there are and what they are called; what a run has measured is in its folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from orchestration.config.compose import compose
from orchestration.config.identity import difference, identity
from orchestration.config.messages import say
from orchestration.config.words import message
from orchestration.results.text import plural
from orchestration.runs.finished import with_threads
from orchestration.storage.files import CONFIG, LOCK, RUN, read_json
from orchestration.storage.run_folder import RunFolder
from orchestration.storage.study_file import RESTORE, SCHEMA, read_study_file, write_study_file
from orchestration.storage.study_file import STUDY_FILE as STUDY
from orchestration.studies.grid import Grid
from orchestration.studies.lanes import PARENT_GONE_S
from orchestration.studies.points import Point
from orchestration.studies.run_queue import FAILED, FINISHED, RUNNING, STOPPED, WAITING

_LEFTOVER_S = PARENT_GONE_S + 30.0  # for processes of a killed start, which have ended by themselves before
_FREE = ("run.", "cluster.", "tracking.", "cluster=", "dataset.root", "dataset.loader_processes")
"""Common words that may change between two starts: they change no result."""
_OF_A_RUN = ("identity", "words", "status", "problem", "attempts")


class StudyFolder:
    """A study on disk.

    Attributes:
        path: the folder.
        content: of study.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = read_study_file(path)
        self._told = False

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of study.json, one for each run."""
        points: list[dict[str, Any]] = self.content["points"]
        return points

    def record(self, run: str) -> dict[str, Any]:
        """Return what study.json keeps of a run."""
        return next(record for record in self.records if record["run"] == run)

    def finished(self) -> list[dict[str, Any]]:
        """Return the records of finished runs whose folders are there: one that was removed is trained again."""
        records = self.records if self.content else []
        return [one for one in records if one["status"] == FINISHED and (self.path / one["run"] / CONFIG).exists()]

    def update(self, run: str, **values: Any) -> None:
        """Change what study.json keeps of a run, on disk too."""
        self.record(run).update(values)
        self.save()

    def save(self) -> None:
        """Write study.json if possible. On a full disk, say, runs go on: what they reach is in their folders."""
        try:
            self.write()
        except OSError as problem:
            if not self._told:
                say(f"{self.path / STUDY}: not written ({problem.strerror}); runs go on, and it is tried again")
            self._told = True

    def write(self) -> None:
        """Write study.json, without passwords."""
        write_study_file(self.path, self.content)

    # Another start of the study

    def problems_with(self, grid: Grid) -> Iterator[str]:
        """Yield why a grid is not a further part of the study in this folder."""
        if not self.content:
            if (self.path / CONFIG).exists():
                yield f"{self.path}: holds a run, not a study; set another study.name"
            return
        lacking = [key for key in ("words", "axes") if key not in self.content]
        lacking += [key for key in _OF_A_RUN if any(key not in record for record in self.records)]
        if lacking:
            yield f"{self.path / STUDY}: found no {', '.join(lacking)}; {RESTORE}"
            return
        axes = {*self.content["axes"], *grid.study.axes}
        old, new = (_by_key(words, axes) for words in (self.content["words"], grid.study.words))
        lines = difference(old, new)
        by_name = {record["run"]: record for record in self.records}
        known = {record["identity"]: record["run"] for record in self.records}
        names = {point.run: known.get(point.identity, point.run) for point in grid.points}
        for point in grid.points:
            for needed in point.after:
                if names[needed] != needed:
                    yield (
                        f"{point.run}: needs {needed}, which was trained as {names[needed]}; needed the labels and "
                        f"axes that the study had then, or another study.name"
                    )
        for point in grid.points:
            record = by_name.get(point.run)
            if not lines and record is not None and point.identity not in known:
                lines = [f"{point.run}: {line}" for line in _differences(record["words"], point.words)]
        if lines:
            yield f"{self.path}: holds another study; {plural(len(lines), 'difference')} (old -> new)"
            yield from (f"  {line}" for line in lines)
            yield "  give the old values to go on with it, or another study.name"

    def take(self, grid: Grid) -> list[Point]:
        """Make the grid a part of the study, and write study.json.

        Returns:
            The points of the grid, those known already by the names that they have.

        Raises:
            ValueError: study.json cannot be written.
        """
        by_identity = {record["identity"]: record for record in (self.records if self.content else [])}
        points, records = [], []
        by_name = {record["run"]: record for record in by_identity.values()}
        for asked in grid.points:
            record = by_identity.pop(asked.identity, None)
            if record is None and (named := by_name.get(asked.run)) is not None:
                record = by_identity.pop(named["identity"], None)  # the same words under a newer version
            point = asked if record is None else replace(asked, run=record["run"])
            before = record or {"status": WAITING, "problem": None, "attempts": 0}
            records.append(point.record() | {key: before[key] for key in ("status", "problem", "attempts")})
            points.append(point)
        records += map(self._left_alone, by_identity.values())  # of earlier starts; not asked for this time
        earlier = self.content
        self.content = {
            "schema": SCHEMA,
            "name": grid.name,
            "words": list(grid.study.words),
            "axes": _united(earlier.get("axes", {}), {key: list(values) for key, values in grid.study.axes.items()}),
            "seeds": sorted({*earlier.get("seeds", ()), *grid.study.seeds}),
            "baseline": _baseline_text(grid),
            "report": dict(grid.study.report),
            "missing": [missing.model_dump() for missing in grid.study.missing],
            "references": grid.study.references,
            "points": records,
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write()
        except OSError as problem:
            raise ValueError(
                f"{self.path / STUDY}: cannot be written ({problem.strerror}); make room there, or make it writable; "
                f"nothing has started"
            ) from problem
        return points

    def _left_alone(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of a run that is not asked for, as it stands: its start may have been killed."""
        try:
            run = read_json(self.path / record["run"] / RUN)
        except (ValueError, OSError):  # damaged: `expertail status` says so, and this start does not need it
            run = {}
        if run.get("status") == "finished":
            return {**record, **_finished(run)}
        if record["status"] == RUNNING:
            return {**record, "status": STOPPED, "problem": "its process was killed"}
        return dict(record)

    def settle(self, points: Sequence[Point], retry: bool) -> list[str]:
        """Bring the status of runs up to what their folders say, after a start that may have been killed.

        Args:
            points: to look at.
            retry: whether failed runs are to be trained again.

        Returns:
            Problems: folders that hold something else.
        """
        problems = list[str]()
        for point in points:
            record = self.record(point.run)
            folder = self.path / point.run
            run = read_json(folder / RUN) if (folder / CONFIG).exists() else {}
            if run and record["status"] != FINISHED:
                problems += _other_run(folder, point)
            if record["status"] == FINISHED and not run:
                again = "it is trained again, unless study.adopt has it"
                say(f"{point.run}: finished once, and {folder} is not there; {again}")
            if run.get("status") == "finished":
                record |= _finished(run)
            elif record["status"] == FAILED and not retry and record["attempts"]:
                continue  # one without an attempt needs a run that had failed, and may be there now
            else:
                record["status"] = WAITING
                record |= {"problem": None} if retry or not record["attempts"] else {}
        if not problems:
            self.write()
        return problems


def _finished(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what study.json keeps of a run whose run.json says that it is finished."""
    return {"status": FINISHED, "problem": None} | ({"adopted": run["adopted"]} if "adopted" in run else {})


def _baseline_text(grid: Grid) -> str | None:
    """Return the baseline as reports take it: words of a label, or the label of a recipe."""
    if grid.baseline is None or "recipe" in grid.baseline:
        return (grid.baseline or {}).get("recipe")
    return " ".join(f"{key}={value}" for key, value in grid.baseline.items())


def _united(old: Mapping[str, list[str]], new: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {key: list(dict.fromkeys([*old.get(key, ()), *new.get(key, ())])) for key in {**old, **new}}


def _by_key(words: Sequence[str], axes: set[str]) -> dict[str, str]:
    """Return words that decide results, by key, without the keys that are an axis at one of two starts."""
    pairs = dict(word.partition("=")[::2] for word in words if not word.startswith(_FREE))
    return {key: value for key, value in pairs.items() if key not in axes}


def _differences(old: Sequence[str], new: Sequence[str]) -> list[str]:
    try:
        return difference(identity(compose(list(old)).config), identity(compose(list(new)).config))
    except ValueError as problem:  # a recipe that is gone
        return [str(problem).splitlines()[-1].strip()]


def _other_run(folder: Path, point: Point) -> Iterator[str]:
    """Yield a problem if a folder holds a run of another config."""
    with contextlib.closing(RunFolder(folder)) as run:
        if run.started:
            try:
                run.check_same_config(with_threads(compose(list(point.words)).config, run.stored_config()))
            except ValueError as problem:
                yield str(problem)


def with_a_folder(grid: Grid, say_line: Callable[[str], None] = say) -> Grid:
    """Return a study without a name under one whose folder is free, or holds the study already.

    What is called by its words may be called as another study whose words differ: a second sweep of the same key, say.
    It gets a digest of what all its runs have in common to its name, the same whenever the command is repeated.
    """
    if grid.study.name is not None:
        return grid
    common = sorted([*grid.study.axes, *_by_key(grid.study.words, set(grid.study.axes)).items()], key=str)
    apart = grid.named(f"{grid.name}-{hashlib.sha256(repr(common).encode()).hexdigest()[:6]}")
    if (apart.folder / STUDY).exists():
        return apart
    there = StudyFolder(grid.folder)
    problems = list(there.problems_with(grid))
    others = there.content and sorted({*there.content["axes"]} ^ {*grid.study.axes})
    if problems or others:
        why = ", ".join(others or ()) or (problems[1].strip() if len(problems) > 1 else "a run")
        say_line(f"{grid.folder}: holds another study ({why}); this one is called {apart.name}; study.name= names it")
        return apart
    return grid


# Locks


@contextlib.contextmanager
def held(path: Path, say_line: Callable[[str], None] = say) -> Iterator[int]:
    """Hold a study's folder: nobody else trains it, and no process of an earlier start does any more.

    Yields:
        An open file, which the processes that train inherit: it stays locked until the last of them has ended.

    Raises:
        ValueError: another process holds the study, or what is left of an earlier start does not end.
    """
    with _opened(path, LOCK) as own, _opened(path, ".lanes.lock") as lanes:
        if not _locked(own):
            own.seek(0)
            holder = own.readline().strip() or "another process"
            raise ValueError(f"{path}: the study is already being carried out by {holder}; wait for it, or stop it")
        own.truncate(0)
        own.write(f"process {os.getpid()} on {platform.node()}\n")
        own.flush()
        end, told = time.monotonic() + _LEFTOVER_S, False
        while not _locked(lanes):
            if time.monotonic() > end:
                raise ValueError(
                    f"{path}: processes of an earlier start still train after {_LEFTOVER_S:.0f} s; wait for them, or "
                    f"stop them (orchestration.commands.lane)"
                )
            if not told:
                say_line("processes of an earlier start still write their checkpoints; waiting for them")
                told = True
            time.sleep(0.2)
        yield lanes.fileno()


def _opened(path: Path, name: str) -> IO[str]:
    """Open a lock of a folder, which is made if it is missing.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return open(path / name, "a+")
    except OSError as error:
        raise ValueError(
            f"{path}: the study's folder cannot be written ({error.strerror}); make it writable, or choose another "
            f"with run.dir and study.name"
        ) from error


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def refuse(name: str, problems: Sequence[str]) -> None:
    """Raise all problems of a study as one error, if there are any."""
    if problems:
        raise ValueError(message(f"study {name}", list(problems)))
