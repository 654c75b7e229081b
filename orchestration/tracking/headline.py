"""The few numbers that a reviewer compares, by the names that they have in MLflow. Pure functions of run folders.

A run has them once it is finished; accuracies are in percent, as in its table.

    best/few                 the model of the best epoch
    cost/gpu_hours           of all workers; without a GPU it is cost/cpu_hours
    cost/gmacs, parameters   of the ensemble that answers; 10^9 multiply-adds per image
    final/<group>            the model of the last epoch: all, few, many, medium
    finals/<stage>/<group>   the same of each of several final stages
    sd/<name>                of a row of a study: standard deviation over its seeds, of the mean that has that name
    runs/finished, failed    of a study
    total/gpu_hours          of a study: of all runs that it trained itself; without a GPU it is total/cpu_hours

Where no class is few-shot by its number of images, but the data set has cuts by index, groups are those by index:
final/few_by_index. Saved views have the names that the data of a study give.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestration.results.tables import CLASS_GROUPS
from orchestration.storage.files import DATA, RUN, evaluations, final_evaluations, read_json

PRIMARY = "final/few"
"""The metric that MLflow's charts open on, where groups are those by count."""
NAMES = ("final/few", "final/medium", "final/many", "final/all", "best/few")
_SPREAD, _COST = "sd/", "cost/"
_BY_INDEX = "_by_index"
_DIGITS = 4  # of percent: 100 x 0.582 is 58.199999999999996
_VIEW = "mlflow.sharedViewState."
VIEW = "recipes"
"""The saved view of a study's experiment that has its rows, with headline metrics as columns."""
FOR_TRAINING = "workflowType=machine_learning"
"""Part of a link: opens MLflow's pages for training. A browser that is new there opens those for language models."""


def headline(run_dir: Path) -> dict[str, float]:
    """Return the headline metrics of a run; none before it is finished.

    Raises:
        ValueError: a file of the run is damaged.
    """
    run = read_json(run_dir / RUN)
    if run.get("status") != "finished":
        return {}
    own, finals = evaluations(run_dir), final_evaluations(run_dir)
    found = _accuracies("final", own.get("last"))
    found |= {key: value for key, value in _accuracies("best", own.get("best")).items() if key.startswith("best/few")}
    for stage, models in finals.items() if len(finals) > 1 else ():
        found |= _accuracies(f"finals/{stage}", models.get("last"))
    return found | _costs(run)


def _accuracies(prefix: str, evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    top1: Mapping[str, float | None] = (evaluation or {}).get("members", {}).get("ensemble", {}).get("top1", {})
    rule = "" if top1.get("few") is not None or top1.get(f"few{_BY_INDEX}") is None else _BY_INDEX
    # The rarest first: MLflow's page that compares runs opens on the metric that a run was given first.
    keys = (*(f"{group}{rule}" for group in reversed(CLASS_GROUPS)), "all")
    return {f"{prefix}/{key}": round(100 * value, _DIGITS) for key in keys if (value := top1.get(key)) is not None}


def _costs(run: Mapping[str, Any]) -> dict[str, float]:
    hours, size = run.get("cost") or {}, run.get("size") or {}
    used = "gpu_hours" if hours.get("gpu_hours") else "cpu_hours"
    found = {used: hours.get(used), "parameters": size.get("parameters")}
    if size.get("multiply_adds") is not None:
        found["gmacs"] = size["multiply_adds"] / 1e9
    return {f"{_COST}{name}": float(value) for name, value in found.items() if value is not None}


def totals(study: Mapping[str, Any], cost_of: Callable[[str], Mapping[str, float]]) -> dict[str, float]:
    """Return how many runs of a study have finished and failed, and the hours of those that it trained itself.

    Args:
        study: content of study.json.
        cost_of: returns the `cost` of run.json, by the name of a run.
    """
    points = study.get("points", ())
    statuses = [point.get("status") for point in points]
    found = {f"runs/{status}": float(statuses.count(status)) for status in ("finished", "failed")}
    costs = [cost_of(point["run"]) for point in points if not point.get("adopted")]
    hours = {name: sum(cost.get(name) or 0.0 for cost in costs) for name in ("gpu_hours", "cpu_hours")}
    # One of them, as of a run; none before a run has a cost: which one it will be is not known, and it would stay.
    used = next((name for name, sum_ in hours.items() if sum_), None)
    return found | ({f"total/{used}": round(hours[used], 4)} if used else {})


def in_words(evaluation: Mapping[str, Any]) -> str:
    """Return the accuracies of an evaluation as one line that begins with few and all; "" where it has none."""
    found = _accuracies("", evaluation)
    if not found:
        return ""
    names = dict.fromkeys([next(iter(found)), "/all", *found])
    shown = ", ".join(f"{name.strip('/').replace('_', ' ')} {found[name]:.1f}" for name in names)
    return f"{shown}: top-1 in % of {evaluation.get('split', 'test')}, epoch {evaluation.get('epoch')}"


def selection_tag(run_dir: Path) -> dict[str, str]:
    """Return which split chose the best epoch, as a tag; {} where there was nothing to choose."""
    split = (evaluations(run_dir).get("best") or {}).get("selected_on")
    return {"best_chosen_on": str(split)} if split else {}


def mean_and_spread(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the runs that have it, and its standard deviation where several have.

    Percentages have two decimals, as in tables.
    """
    values: dict[str, list[float]] = {}
    for metrics in runs:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    found = {name: statistics.fmean(own) for name, own in values.items()}
    for name, own in values.items():
        if len(own) > 1 and not name.startswith(_COST):
            found[_SPREAD + name] = statistics.stdev(own)
    # MLflow shows all digits that there are, of which a column has room for few.
    return {k: float(f"{v:.4g}") if k.startswith(_COST) and v < 1e4 else round(v, 2) for k, v in found.items()}


# Saved views


def grouped_by_index(runs: Iterable[Path]) -> bool | None:
    """Return whether headline metrics of some runs are those of groups by index; None where their data are not known.

    It is False as soon as one of them has few-shot classes by count, as the runs of several imbalance ratios may.
    """
    found = None
    for run in runs:
        groups = read_json(run / DATA).get("groups") or {}
        few = {rule: bool((own or {}).get("few")) for rule, own in groups.items()}
        if few.get("by_count"):
            return False
        if few:
            found = bool(found or few.get("by_index"))
    return found


def _named(name: str, by_index: bool) -> str:
    """Return the name of a headline metric under one of the rules that group classes."""
    return f"{name}{_BY_INDEX}" if by_index and name.rpartition("/")[2] in CLASS_GROUPS else name


def experiment_tags(of_study: bool, by_index: bool = False) -> dict[str, str]:
    """Return the tags that make an experiment's pages open on the headline metrics.

    MLflow's list of runs has no column for a metric by itself. A saved view has; it is in the menu "Views".

    Args:
        of_study: whether the experiment has rows of a study, which have a view of their own.
        by_index: whether groups are those by index.
    """
    primary = _named(PRIMARY, by_index)
    names = [_named(name, by_index) for name in NAMES]
    found = {
        "mlflow.experiment.primaryMetric.name": primary,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        f"{_VIEW}runs": _view("All runs", "", names, "params.`seed`", "tags.`recipe`"),
    }
    if of_study:
        spread = (f"metrics.`{_SPREAD}{primary}`", f"metrics.`{_SPREAD}final/all`", "tags.`seeds`")
        found[_VIEW + VIEW] = _view("Recipes, means over seeds", "tags.role = 'row'", names, *spread)
    return found


def _view(name: str, search: str, metrics: Sequence[str], *columns: str) -> str:
    """Return a saved view: runs that are searched for, with metrics as columns, the best by the first metric first."""
    shown = [*(f"metrics.`{metric}`" for metric in metrics), *columns]
    state = {
        "searchFilter": search, "orderByKey": shown[0], "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "modelVersionFilter": "All Runs", "datasetsFilter": [],
        "selectedColumns": shown,
    }  # fmt: skip
    made = 1_767_225_600_000  # milliseconds; the same each time, so that the tag stays as it is
    return json.dumps({"name": name, "createdAt": made, "updatedAt": made, "state": json.dumps(state)})
