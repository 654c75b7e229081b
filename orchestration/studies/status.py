"""The text of `expertail status`: state, epoch, time left, accuracy, cost and failure of each run. Files alone tell."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestration.results.text import duration, plural, text_table
from orchestration.storage.files import CONFIG, read_config, read_json, refuse_sweep
from orchestration.storage.journal import FILE_NAME as JOURNAL
from orchestration.storage.run_folder import origin_name
from orchestration.tracking.contents import STUDY_FILE

_TAIL_BYTES = 2**17  # of a journal, from which pace and place are read
_PROBLEM_CHARACTERS = 160


def status_text(place: Path) -> str:
    """Return a table of the runs of a study, or of the runs in a folder.

    Raises:
        ValueError: the folder holds neither.
    """
    refuse_sweep(place)
    study = read_json(place / STUDY_FILE)
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
        raise ValueError(f"{place}: holds neither a study nor runs; needed the folder of one, e.g. runs/tour")
    states = [_state(place / record["run"], record) for record in records]
    rows = [["run", "state", "epoch", "left", "all", "few", "hours", "attempts"]]
    rows += [
        [state[key] for key in ("run", "state", "epoch", "left", "all", "few", "hours", "attempts")] for state in states
    ]
    counts = Counter(state["state"] for state in states)
    head = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines = [
        *inner,
        f"{study['name'] if study else place}: {plural(len(states), 'run')}; {head}",
        "",
        *text_table(rows, left=(0, 1, 2)),
    ]
    problems = [f"{state['run']}: {state['problem']}" for state in states if state["problem"]]
    lines += ["", *problems] if problems else []
    lines += [f"{record['run']}: taken over from {origin_name(record['adopted'])}" for record in records
              if record.get("adopted")]  # fmt: skip
    lines += [f"missing: {one['label']} ({one['why']})" for one in (study.get("missing") or [])] if study else []
    return "\n".join(lines)


def _summary(folder: Path) -> str:
    """Return a line about a study among other runs."""
    statuses = Counter(point["status"] for point in read_json(folder / STUDY_FILE)["points"])
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    return f"{folder}: a study of {plural(sum(statuses.values()), 'run')}; {counts}"


def _state(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one run, as text."""
    run = read_json(folder / "run.json")
    state = record.get("status") or run.get("status") or "not begun"
    if state == "running" and run.get("status") == "waiting":
        state = "waits for places"
    epoch, left = _moment(folder) if state != "finished" else ("", "")
    top1 = read_json(folder / "evaluation" / "last.json").get("members", {}).get("ensemble", {}).get("top1", {})
    shown = {group: "" if top1.get(group) is None else f"{100 * top1[group]:.1f}" for group in ("all", "few")}
    hours = (run.get("cost") or {}).get("worker_hours")
    problem = record.get("problem") or (run.get("problem") if state in ("failed", "stopped") else None)
    return {
        "run": str(record["run"]),
        "state": str(state),
        "epoch": epoch,
        "left": left if state == "running" else "",
        **shown,
        "hours": "" if hours is None else f"{hours:.2f}",
        "attempts": str(record.get("attempts", run.get("starts", ""))),
        "problem": (str(problem or "").strip().splitlines() or [""])[0][:_PROBLEM_CHARACTERS],
    }


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
