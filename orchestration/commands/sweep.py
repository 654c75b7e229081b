"""`expertail sweep`: train one run per value of a key or group, one after the other on one Ray, and compare them.

Every run is a complete one in its own folder, the same that `expertail train` makes with that value. A sweep is cheaper
because a stage that the value cannot affect is trained once: the other runs get its checkpoints, its part of the
journal and its evaluations before they start, and continue like any interrupted run. run.json lists such stages under
`stages_taken`. A sweep can be started again: finished runs stay, an interrupted one is resumed.

sweep
    `plan_sweep`          a config per value; refuse what cannot be compared
    for each unfinished run
        `take_over_stages`    copy the stages that another run has trained already
        `train_and_report`    train the rest
    `_save`               sweep.json and table.txt, after every run
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from orchestration.cluster.connection import cluster
from orchestration.commands.train import train_and_report
from orchestration.config.compose import compose
from orchestration.config.folders import digests
from orchestration.config.identity import difference, identity
from orchestration.config.messages import in_one_line, say, show
from orchestration.config.run_config import RunConfig, name_problems
from orchestration.config.words import UNMIXED
from orchestration.results.classifier_table import loss_label
from orchestration.results.sweep_table import draw_sweep, sweep_table
from orchestration.results.text import plural
from orchestration.runs.admission import admit
from orchestration.runs.finished import is_complete, with_threads
from orchestration.storage.files import DATA, final_evaluations, read_json, write_atomic, write_json
from orchestration.storage.location import run_path
from orchestration.storage.run_folder import RunFolder
from orchestration.storage.url_store import is_url
from orchestration.studies.shared_stages import take_over_stages
from orchestration.tracking.contents import SWEEP_FILE as SWEEP
from orchestration.tracking.ownership import settle_ownership
from orchestration.tracking.target import tracking_uri
from orchestration.tracking.uploader import Uploader, start_uploader

_NAME_CHARACTERS = 60  # of a value, in the name of its run
_PARTS = ("method", "mix", "then")  # groups that a recipe's name is made of


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the value as text, and the config with it."""

    value: str
    config: RunConfig
    files: tuple[str, ...] = ()
    """Names of the files that made the config."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return run_path(self.config)


def sweep(variation: str, words: list[str]) -> int:
    """Train one run per value, or what is left of it, and compare them in <run.dir>/<name>-sweep/.

    Output of the runs goes to stderr, the table to stdout. A run whose loss is not finite is recorded as failed and the
    next one starts; anything else that ends a run ends the sweep.

    Args:
        variation: `key=v1,v2,...`.
        words: overrides for all runs.

    Returns:
        The exit code: 1 when a run failed.

    Raises:
        ValueError: the variation is malformed, a config is not valid, or a folder holds another run or sweep. Raised
            before anything is started.
    """
    key, points, folder = plan_sweep(variation, words)

    for point in points:  # each is admitted again when its turn comes, which may be days later
        admit(point.config)
    left = [point for point in points if not _is_finished(point)]
    problems: dict[str, str] = {}
    _save(folder, key, points, problems)
    _settle(folder, points[0].config)  # before its runs, whose parent in MLflow is the one that it names
    if left:
        with _upload_if_interrupted(folder, points[0].config), cluster(left[0].config.cluster.address):
            for number, point in enumerate(left, 1):
                say(f"sweep: {key} = {point.value}, run {number} of {len(left)}")
                try:
                    with contextlib.redirect_stdout(sys.stderr):
                        # The folder is locked here and again by `train_and_report`, so it is released in between.
                        with contextlib.closing(RunFolder(point.folder)) as run:
                            run.update_run(study=folder.name, recipe=digests(point.files))
                        take_over_stages(point.config, point.folder, [other.folder for other in points])
                        train_and_report(point.config, {"start": time.time()})
                except FloatingPointError as problem:
                    problems[point.value] = str(problem)
                    say(str(problem))
                finally:
                    _save(folder, key, points, problems)

    result = _save(folder, key, points, problems)
    show(sweep_table(result))
    show(f"\nsaved in {folder}: {SWEEP}, table.txt, {draw_sweep(folder, result)}")
    try:
        uploader = _uploader(folder, points[0].config)
        incomplete = uploader and uploader.finish(points[0].config.tracking.final_wait_s)
    except Exception as problem:  # the runs are trained and compared, and this does not change it
        incomplete = f"sweep: table and picture were not uploaded ({in_one_line(problem)}); {_later(folder)}"
    if incomplete:
        say(incomplete)
    return 1 if problems else 0


def _settle(folder: Path, config: RunConfig) -> None:
    """Give a copied sweep an MLflow run of its own, if it is tracked."""
    if not config.tracking.enabled:
        return
    try:
        if line := settle_ownership(folder):
            say(line)
    except (OSError, ValueError) as problem:  # of the upload alone
        say(f"tracking: {in_one_line(problem)}; training goes on; {_later(folder)}")


def _later(folder: Path) -> str:
    return f"later: expertail sync {folder}"


def _uploader(folder: Path, config: RunConfig) -> Uploader | None:
    """Start the uploader of the sweep's own files, to the parent of its runs in MLflow; None if tracking is off."""
    if not config.tracking.enabled:
        return None
    if line := settle_ownership(folder):
        say(line)
    return start_uploader(folder, tracking_uri(config), config.tracking.experiment)


@contextlib.contextmanager
def _upload_if_interrupted(folder: Path, config: RunConfig) -> Iterator[None]:
    """Start the uploader when the sweep is stopped. It outlives this process, marks the sweep as stopped and ends."""
    try:
        yield
    except BaseException:
        try:
            _uploader(folder, config)
        except Exception as problem:  # must not hide what stopped the sweep
            say(f"sweep: table and picture were not uploaded ({in_one_line(problem)}); {_later(folder)}")
        raise


def plan_sweep(variation: str, words: list[str]) -> tuple[str, list[Point], Path]:
    """Plan a sweep; nothing is started or written.

    Returns:
        The key that varies, the runs, and the sweep's folder.

    Raises:
        ValueError: see `sweep`.
    """
    key, values = _values(variation)
    if any(word.split("=")[0] == key for word in words):
        raise ValueError(f"{key}: set twice, to several values and to one; leave out the second")

    # Every config is composed as `expertail train` would do it; all that are refused are reported together.
    composed, problems = {}, []
    for value in values:
        try:
            composed[value] = compose([*words, f"{key}={value}"])
        except ValueError as problem:
            problems.append(str(problem))
    if problems:
        raise ValueError("\n".join(problems))

    configs = {value: one.config for value, one in composed.items()}
    first = configs[values[0]]
    named = any(word.startswith("run.name=") for word in words)
    points = [
        Point(value, _with_name(config, _run_name(key, value, config, named)), composed[value].files)
        for value, config in configs.items()
    ]
    if is_url(first.run.dir):
        raise ValueError(
            f"run.dir = {first.run.dir}: a sweep compares run folders on disk; needed a folder; set run.dir=/..., or "
            f"train the runs one by one"
        )
    common = first.run_name if named or key not in _PARTS else _named_by(key, values[0], first.run_name)
    folder = run_path(_with_name(first, f"{common}-sweep"))
    problems = [problem for point in points for problem in name_problems(point.config)]
    problems = problems or [*_duplicates(key, points), *_other_sweep(folder, key, first), *_other_runs(points)]
    if problems:
        raise ValueError("\n".join(problems))
    return key, points, folder


def _run_name(key: str, value: str, config: RunConfig, named: bool) -> str:
    """Return the name of one run. Of parts that vary the recipe's own name tells already, unless run.name is given."""
    return config.run_name if key in _PARTS and not named else f"{config.run_name}-{_name_part(value)}"


def _named_by(key: str, value: str, name: str) -> str:
    """Return a run's name with the parts that vary replaced by the name of their group: ce+then-digits_lt-s0."""
    chosen = "+".join(_parts(value)) or (UNMIXED if key == "mix" and f"+{UNMIXED}" in name else "")
    if not chosen:
        return f"{name}-{key}"
    head, found, tail = ("", "", name.removeprefix(chosen)) if key == "method" else name.rpartition(f"+{chosen}")
    return f"{head}{'+' if found else ''}{key}{tail}"


def _parts(value: str) -> list[str]:
    return [part for part in re.split(r"[\[\],\s]+", value) if part not in ("", "null")]


def _with_name(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def _values(variation: str) -> tuple[str, list[str]]:
    """Return the key and its values, each as the text of an override."""
    needed = "needed KEY=V1,V2,..., e.g. method.stages.h2t.flow.ratio=0,0.1,0.25,0.5,1 or method=ce,ldam"
    try:
        override = OverridesParser.create().parse_override(variation)
    except HydraException:
        raise ValueError(f"{variation}: {needed}") from None
    if not override.is_sweep_override():
        raise ValueError(f"{variation}: one value; {needed}; `expertail train` takes one")
    if override.key_or_group in ("dataset", "cluster"):
        raise ValueError(f"{variation}: a sweep compares runs on the same data and cluster; {needed}")
    values = list(dict.fromkeys(str(value) for value in override.sweep_string_iterator()))
    if len(values) < 2:
        raise ValueError(f"{variation}: found only {plural(len(values), 'different value')}; {needed}")
    return override.key_or_group, values


def _name_part(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", value).strip("_")[:_NAME_CHARACTERS] or "_"


def _duplicates(key: str, points: list[Point]) -> list[str]:
    """Return a problem for each pair of values that give the same run, or runs in one folder."""
    problems = []
    for place, point in enumerate(points):
        for other in points[:place]:
            if identity(point.config) == identity(other.config):
                problems.append(
                    f"{key} = {other.value} and {point.value}: both runs would compute the same; leave one out"
                )
            elif point.folder == other.folder:
                problems.append(f"{key} = {other.value} and {point.value}: both runs would be {point.folder}")
    return problems


def _without(config: RunConfig, key: str) -> dict[str, Any]:
    """Return the part of an identity that the runs of a sweep have in common."""
    return {k: value for k, value in identity(config).items() if k != key and not k.startswith(f"{key}.")}


def _other_sweep(folder: Path, key: str, first: RunConfig) -> list[str]:
    earlier = read_json(folder / SWEEP)
    if not earlier:
        return []
    if earlier["key"] != key:
        return [f"{folder}: holds a sweep over {earlier['key']}, not {key}; set another run.name"]
    lines = difference(earlier["config"], json.loads(json.dumps(_without(first, key))))
    if not lines:
        return []
    return [
        f"{folder}: holds a sweep with another config; {plural(len(lines), 'difference')} (old -> new)",
        *(f"  {line}" for line in lines),
        "  give the old values to go on with it, or another run.name",
    ]


def _other_runs(points: list[Point]) -> list[str]:
    """Return a problem for each folder that holds a run of another config."""
    problems = []
    for point in points:
        if (point.folder / "config.yaml").exists():
            with contextlib.closing(RunFolder(point.folder)) as folder:
                if folder.started:
                    try:
                        folder.check_same_config(with_threads(point.config, folder.stored_config()))
                    except ValueError as problem:
                        problems.append(str(problem))
    return problems


def _is_finished(point: Point) -> bool:
    if not (point.folder / "config.yaml").exists():
        return False
    with contextlib.closing(RunFolder(point.folder)) as folder:
        return folder.started and is_complete(folder, point.config)


# Results


def _save(folder: Path, key: str, points: list[Point], problems: dict[str, str]) -> dict[str, Any]:
    """Write sweep.json and table.txt with what is known so far. Returns the content of sweep.json."""
    outcomes = [_outcome(point, problems.get(point.value)) for point in points]
    statuses = {outcome["status"] for outcome in outcomes}
    name = points[0].config.method.name
    result = {
        "key": key,
        "method": _named_by(key, points[0].value, name) if key in _PARTS else name,
        "dataset": points[0].config.dataset.name,
        "seed": points[0].config.seed,
        "status": "failed" if "failed" in statuses else "finished" if statuses == {"finished"} else "running",
        "runs": outcomes,
        "config": _without(points[0].config, key),
    }
    result["group_sizes"] = next((sizes for point in points if (sizes := _group_sizes(point.folder))), {})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SWEEP, result)
    write_atomic(folder / "table.txt", sweep_table(result) + "\n")
    return result


def _outcome(point: Point, problem: str | None) -> dict[str, Any]:
    """Summarise a run, with the accuracy of its last model once it is finished."""
    run = read_json(point.folder / "run.json")
    status = "failed" if problem else run.get("status", "not begun")
    outcome: dict[str, Any] = {"value": point.value, "run": point.folder.name, "status": status}
    outcome["problem"] = problem or (run.get("problem") if status == "failed" else None)
    outcome["stages_taken"] = run.get("stages_taken", {})
    outcome |= {"loss": loss_label(point.config.method.name, point.config.method.finals), "seed": point.config.seed}
    if status == "finished":
        evaluation = read_json(point.folder / "evaluation" / "last.json")
        outcome |= {k: evaluation.get(k) for k in ("stage", "epoch", "step", "split")}
        outcome["top1"] = evaluation["members"]["ensemble"]["top1"]
        if finals := final_evaluations(point.folder):
            outcome["finals"] = {stage: own["last"]["members"]["ensemble"]["top1"] for stage, own in finals.items()}
    return outcome


def _group_sizes(folder: Path) -> dict[str, int]:
    groups = read_json(folder / DATA).get("groups") or {}
    by_index = {f"{group}_by_index": ids for group, ids in (groups.get("by_index") or {}).items()}
    return {group: len(ids) for group, ids in {**(groups.get("by_count") or {}), **by_index}.items()}
