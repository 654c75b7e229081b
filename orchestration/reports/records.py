"""Records: the results of finished runs, read from their folders alone; one for each final stage of each run.

A damaged file costs the run that it belongs to, and is named; the report goes on without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.config.compose import from_yaml
from orchestration.config.run_config import RunConfig
from orchestration.results.finals_table import distinct
from orchestration.results.label_shift import RULES
from orchestration.results.tables import CLASS_GROUPS
from orchestration.storage.files import CONFIG, DATA, RUN, evaluations, final_evaluations, read_json
from orchestration.storage.predictions import MEASURES, file_of

MODELS = ("last", "best")
BY_COUNT = CLASS_GROUPS
BY_INDEX = tuple(f"{group}_by_index" for group in CLASS_GROUPS)
ENSEMBLE = "ensemble"
_NAMED = 3  # runs of one state that are named when there are more


@dataclass(frozen=True)
class Data:
    """The data that runs were trained on.

    Attributes:
        digest: of the data, hexadecimal.
        name: of the data set.
        counts: training images per class.
        class_names: as many.
        groups: class ids by group; the keys of `BY_COUNT` and, where the set has cuts by index, of `BY_INDEX`.
    """

    digest: str
    name: str
    counts: tuple[int, ...]
    class_names: tuple[str, ...]
    groups: Mapping[str, tuple[int, ...]]

    @property
    def line(self) -> str:
        """One line that says what was trained on."""
        most, least = max(self.counts), min(self.counts)
        ratio = f"{most / least:.4g}" if least else "undefined"
        return (
            f"{self.name}: {sum(self.counts):,} training images of {len(self.counts):,} classes, {most:,} to {least:,} "
            f"per class (ratio {ratio})"
        )


@dataclass(frozen=True)
class Model:
    """The measures of one model, "last" or "best".

    Attributes:
        values: by name: `all`, the groups of both rules, `nll` (nats), `ece`, `worst`, `balanced`, `macro_f1`, `top5`;
            fractions; None where there is none.
        per_class: accuracy of each class, fractions [C]; NaN for classes without a test image.
        split, images: that it was measured on, and how many there are.
        selected_on: the split that chose its epoch; None for the last epoch, and where there was nothing to choose.
        epoch, step: of the stage.
        predictions: file of what it says of every image; None where none was kept.
    """

    values: Mapping[str, float | None]
    per_class: np.ndarray
    split: str
    images: int | None
    selected_on: str | None
    epoch: int | None
    step: int | None
    predictions: Path | None


@dataclass(frozen=True)
class Record:
    """The result of one final stage of a finished run.

    Attributes:
        run, folder: name and folder of the run.
        stage: the final stage where the recipe has several, else "".
        config: of the run, as it was trained.
        data: that it was trained on.
        models: "last" and "best"; "best" is missing where the stage has no steps.
        facts: content of run.json.
        label: parts of its name by key, as a study gives them; None outside a study.
        role: "run", or "reference" for a run that others are measured by.
        shifts: results on other test distributions, as `expertail evaluate --distribution` leaves them.
    """

    run: str
    folder: Path
    stage: str
    config: RunConfig
    data: Data
    models: Mapping[str, Model]
    facts: Mapping[str, Any]
    label: Mapping[str, str] | None
    role: str
    shifts: tuple[Mapping[str, Any], ...]

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def final(self) -> str:
        """The stage that the result is of."""
        return self.stage or self.config.method.final


@dataclass(frozen=True)
class LeftOut:
    """A run that a report cannot show: its name, its state, and why."""

    run: str
    state: str
    why: str = ""


def read_run(folder: Path, label: Mapping[str, str] | None = None, role: str = "run") -> list[Record] | LeftOut:
    """Read the results of a run, or say why it has none to show.

    Args:
        folder: of the run.
        label, role: see `Record`.
    """
    try:
        facts = read_json(folder / RUN)
        state = str(facts.get("status", "not begun"))
        if state != "finished":
            return LeftOut(folder.name, state, str(facts.get("problem") or facts.get("waits_for") or ""))
        return _records(folder, facts, label, role)
    except (ValueError, OSError, KeyError, TypeError) as problem:
        text = f"{problem}" if isinstance(problem, ValueError) else f"{folder}: {type(problem).__name__}: {problem}"
        return LeftOut(folder.name, "damaged", text)


def _records(folder: Path, facts: Mapping[str, Any], label: Mapping[str, str] | None, role: str) -> list[Record]:
    config = from_yaml(folder / CONFIG)
    data = _data(folder)
    found: Mapping[str, Mapping[str, Any]] = final_evaluations(folder)
    if len(found) < 2:
        found = {"": evaluations(folder)}
    records = []
    for stage, own in found.items():
        place = folder / "evaluation" / stage
        if not own.get("last"):
            raise ValueError(f"{place / 'last.json'}: missing; needed the evaluation of the last model; train it again")
        models = {which: _model(place, which, one, data) for which, one in distinct(own).items()}
        records.append(
            Record(folder.name, folder, stage, config, data, models, _light(facts), label, role, _shifts(place))
        )
    return records


def _data(folder: Path) -> Data:
    found = read_json(folder / DATA)
    if not found.get("digest") or not found.get("counts"):
        raise ValueError(f"{folder / DATA}: missing, or without digest and counts; needed to know the run's data")
    groups: dict[str, tuple[int, ...]] = {}
    for rule, keys in (("by_count", BY_COUNT), ("by_index", BY_INDEX)):
        own = (found.get("groups") or {}).get(rule)
        if own:
            groups |= {key: tuple(own.get(group, ())) for key, group in zip(keys, CLASS_GROUPS, strict=True)}
    names = found.get("class_names") or range(len(found["counts"]))
    return Data(found["digest"], found.get("dataset", "data"), tuple(found["counts"]), tuple(map(str, names)), groups)


def _model(place: Path, which: str, evaluation: Mapping[str, Any], data: Data) -> Model:
    path = place / f"{which}.json"
    try:
        ensemble = evaluation["members"][ENSEMBLE]
        values: dict[str, float | None] = {key: ensemble["top1"].get(key) for key in ("all", *BY_COUNT, *BY_INDEX)}
        if not isinstance(values["all"], float | int):
            raise KeyError("all")
        per_class = np.array([np.nan if v is None else v for v in ensemble["per_class"]], dtype=float)
        if len(per_class) != len(data.counts):
            raise ValueError(f"{len(per_class)} classes, not {len(data.counts)}")
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ValueError(
            f"{path}: found no accuracy of the ensemble by group and class ({problem}); restore the file"
        ) from None
    there = per_class[np.isfinite(per_class)]
    values |= {key: _finite(ensemble.get(key)) for key in ("nll", "ece")}
    values |= {"worst": float(there.min()), "balanced": float(there.mean())} if len(there) else {}
    split = str(evaluation.get("split", "test"))
    measured = (read_json(place / MEASURES).get(which) or {}).get(split, {}).get(ENSEMBLE) or {}
    values |= {key: measured.get(key) for key in ("macro_f1", "top5")}
    kept = file_of(place, which, split)
    chosen = evaluation.get("selected_on") if which == "best" else None
    return Model(
        values, per_class, split, evaluation.get("num_images"), chosen, evaluation.get("epoch"),
        evaluation.get("step"), kept if kept.is_file() else None,
    )  # fmt: skip


def _finite(value: float | None) -> float | None:
    """Return a number, or None where a model has diverged: an infinite loss has no mean over seeds."""
    return value if value is not None and math.isfinite(value) else None


def _light(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report needs of run.json; of the rest there may be much."""
    keys = ("created", "ended", "commit", "config_hash", "versions", "host", "mesh", "cost", "status", "recipe",
            "adopted", "stages_taken")  # fmt: skip
    return {key: facts[key] for key in keys if key in facts}


def _shifts(place: Path) -> tuple[Mapping[str, Any], ...]:
    """Read the results on other test distributions. The names are those that `expertail evaluate` gives the files."""
    files = sorted(path for rule in RULES for path in place.glob(f"{rule}*.json"))
    return tuple(found for path in files if (found := read_json(path)).get("distributions"))


def unfinished_lines(left_out: Sequence[LeftOut], at_most: int = 20) -> list[str]:
    """Return a line for each run that is not shown, or for many of one state; and one for those beyond `at_most`."""
    alike: dict[tuple[str, str], list[str]] = {}
    for one in left_out:
        alike.setdefault((one.state, one.why), []).append(one.run)
    found = [line for (state, why), runs in alike.items() for line in _state_lines(state, why, runs)]
    lines, rest = found[:at_most], len(found) - at_most
    return [*lines, f"and {rest:,} more"] if rest > 0 else lines


def _state_lines(state: str, why: str, runs: Sequence[str]) -> list[str]:
    because = f": {why}" if why else ""
    if len(runs) <= _NAMED:
        return [f"{run}: {state}{because}" for run in runs]
    return [f"{len(runs):,} {state}: {', '.join(runs[:_NAMED])} and {len(runs) - _NAMED:,} more{because}"]
