"""The text of `expertail status`: state, epoch, time left, accuracy, cost and failure of each run. Files alone tell.

What files say last is not always so: a killed process leaves `running` behind. Who holds a folder is looked up.

    waiting, starting, waits for places, running, finished, failed, stopped     as noted
    interrupted    noted as running, and nobody holds it: its process was killed; the same command goes on
    gone           finished or begun once, and its folder is not there
    damaged        a file of it cannot be read
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestration.results.text import duration, plural, text_table
from orchestration.storage.files import CONFIG, LOCK, RUN, read_config, read_json, refuse_sweep
from orchestration.storage.holders import holder
from orchestration.storage.journal import FILE_NAME as JOURNAL
from orchestration.storage.run_folder import origin_name
from orchestration.storage.study_file import STUDY_FILE, read_study_file
from orchestration.studies.progress import seconds_left

_TAIL_BYTES = 2**17  # of a journal, from which pace and place are read
_PROBLEM_CHARACTERS = 160
_COLUMNS = ("run", "state", "epoch", "left", "all", "few", "hours", "attempts")
_GOES_ON = ("running", "waiting", "starting", "waits for places")
"""States that only a living process keeps."""


def status_text(place: Path, *, who: bool = True) -> str:
    """Return a table of the runs of a study, or of the runs in a folder.

    Args:
        place: the folder.
        who: whether to say who carries a study out; its own process knows.

    Raises:
        ValueError: the folder holds neither, or study.json is damaged.
    """
    refuse_sweep(place)
    study = read_study_file(place) if place.is_dir() else {}
    inner = [] if study else [_summary(path.parent) for path in sorted(place.glob(f"*/{STUDY_FILE}"))]
    if study:
        records = study["points"]
    elif (place / CONFIG).exists():
        records, place = [{"run": place.name}], place.parent
    else:
        records = [{"run": path.parent.name} for path in sorted(place.glob(f"*/{CONFIG}"))]
    if inner and not records:
        return "\n".join(inner)
    if not records:
        raise ValueError(
            f"{place}: found {_what(place)}; needed the folder of a study, of runs or of one run, e.g. runs/tour"
        )
    held = holder(place / LOCK) if study else None
    states = [state_of(place / record["run"], record, alive=held is not None) for record in records]
    counts = Counter(state["state"] for state in states)
    head = ", ".join(f"{count} {state}" for state, count in counts.items())
    rows = [list(_COLUMNS), *([state[key] for key in _COLUMNS] for state in states)]
    lines = [*inner, f"{study.get('name', place)}: {plural(len(states), 'run')}; {head}"]
    waits = f"; it waits for {study['waits_for']}" if held and study.get("waits_for") else ""
    lines += [_who(held, counts) + waits + (_rest(states) if held else "")] if study and who else []
    lines += ["", *text_table(rows, left=(0, 1, 2))]
    problems = [f"{state['run']}: {state['problem']}" for state in states if state["problem"]]
    lines += ["", *problems] if problems else []
    lines += [f"{record['run']}: taken over from {origin_name(record['adopted'])}" for record in records
              if record.get("adopted")]  # fmt: skip
    lines += [f"missing: {one['label']} ({one['why']})" for one in study.get("missing") or ()]
    return "\n".join(lines)


def _what(place: Path) -> str:
    if place.is_dir():
        return "a folder without study.json, and without runs in it"
    return "a file" if place.exists() else "nothing there"


def _who(held: str | None, counts: Mapping[str, int]) -> str:
    """Return a line about who carries a study out, and what to do where nobody does."""
    if held is not None:
        ended = not any(counts.get(state) for state in _GOES_ON)
        return f"carried out by {held}" + ("; it writes the report" if ended else "")
    left = sum(counts.get(state, 0) for state in ("waiting", "stopped", "interrupted", "gone"))
    again = [f"the same `expertail study` goes on with {plural(left, 'run')}"] if left else []
    again += ["study.retry=failed trains failed runs again"] if counts.get("failed") else []
    return "; ".join(["nobody carries it out", *again])


def _rest(states: Sequence[Mapping[str, str]]) -> str:
    """Return about how long a study that is carried out still takes; nothing before a run has finished."""
    took = [float(state["seconds"]) for state in states if state["seconds"]]
    now = time.time()
    since = [float(state["began"] or now) for state in states if state["state"] in ("running", "starting")]
    left = seconds_left(took, since, sum(state["state"] == "waiting" for state in states), now)
    return f"; about {duration(left)} left" if left else ""


def _summary(folder: Path) -> str:
    """Return a line about a study among other runs."""
    try:
        points = read_study_file(folder)["points"]
    except ValueError as problem:
        return f"{folder}: a study that cannot be read: {problem}"
    alive = holder(folder / LOCK) is not None
    states = Counter(state_of(folder / point["run"], point, alive=alive)["state"] for point in points)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"{folder}: a study of {plural(len(points), 'run')}; {counts}"


def state_of(folder: Path, record: Mapping[str, Any], *, alive: bool) -> dict[str, str]:
    """Return the cells of one run, as text.

    Args:
        folder: of the run.
        record: of it in study.json; its name alone outside a study.
        alive: whether a process carries its study out.
    """
    blank = {**dict.fromkeys((*_COLUMNS, "problem", "seconds", "began"), ""), "run": str(record["run"])}
    blank["attempts"] = str(record.get("attempts", ""))
    try:
        return blank | _cells(folder, record, alive=alive)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as problem:
        return blank | {"state": "damaged", "problem": _short(str(problem) or type(problem).__name__)}


def _cells(folder: Path, record: Mapping[str, Any], *, alive: bool) -> dict[str, str]:
    run = read_json(folder / RUN)
    state, problem = _state(folder, record, run, alive=alive), record.get("problem") or run.get("problem")
    epoch, left = _moment(folder) if state != "finished" else ("", "")
    top1 = read_json(folder / "evaluation" / "last.json").get("members", {}).get("ensemble", {}).get("top1", {})
    hours = (run.get("cost") or {}).get("worker_hours")
    told = problem if state in ("failed", "stopped") else run.get("waits_for") if state == "waits for places" else None
    return {
        "state": state,
        "epoch": epoch,
        "left": left if state == "running" else "",
        **{group: "" if top1.get(group) is None else f"{100 * top1[group]:.1f}" for group in ("all", "few")},
        "hours": "" if hours is None else f"{hours:.2f}",
        "seconds": "" if hours is None or state != "finished" else str(3600 * hours / len(run.get("workers") or [1])),
        "began": str((folder / LOCK).stat().st_mtime) if state == "running" else "",
        "attempts": str(record.get("attempts", run.get("starts", ""))),
        "problem": _short(str(told or "")),
    }


def _state(folder: Path, record: Mapping[str, Any], run: Mapping[str, Any], *, alive: bool) -> str:
    """Return how a run stands, by what is noted and by who lives."""
    noted, own = record.get("status"), str(run.get("status") or "")
    if noted in ("finished", "stopped", "running") and not folder.is_dir():
        return (
            "gone" if noted == "finished" else "starting" if alive else "interrupted" if noted == "running" else noted
        )
    if own == "finished":  # the folder knows better than a study that was killed before it noted it
        return own
    held = holder(folder / LOCK) is not None
    if noted in (None, "running"):
        if own in ("running", "waiting") and held:
            return "waits for places" if own == "waiting" else own
        if noted == "running" and alive:
            return "starting"
        if noted == "running" or own in ("running", "waiting"):
            return "interrupted"
    return str(noted or own or "not begun")


def _short(problem: str) -> str:
    return (problem.strip().splitlines() or [""])[0][:_PROBLEM_CHARACTERS]


def _moment(folder: Path) -> tuple[str, str]:
    """Return how far a run is, and about how long it still takes, as text; nothing where that is not known."""
    records = list(_tail(folder / JOURNAL))
    stages = (read_config(folder).get("method") or {}).get("stages") or {}
    if not records or records[-1]["stage"] not in stages:
        return "", ""
    last = records[-1]
    own = [record for record in records if record["stage"] == last["stage"]]
    names = list(stages)
    later = sum(stages[name].get("epochs") or 0 for name in names[names.index(last["stage"]) + 1 :])
    epochs = stages[last["stage"]].get("epochs") or 0
    where = f"{last['stage']} {last['epoch']}/{epochs}" if len(names) > 1 else f"{last['epoch']}/{epochs}"
    passed = last["epoch"] - own[0]["epoch"]
    if passed < 1:
        return where, ""
    pace = (last["time"] - own[0]["time"]) / passed
    return where, duration(pace * (epochs - last["epoch"] + later))


def _tail(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines at the end of a journal."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    for line in lines[1 if size > _TAIL_BYTES else 0 :]:
        try:
            yield json.loads(line)
        except ValueError:
            continue
