"""The measurements of a study once its runs have ended: the key `evaluate` of its `report`.

Each finished run is measured once for each rule of weights, on all distributions that are asked of it with this rule:
one file holds them. The model is that which the report shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from experts.data.label_shift import parse_distribution, published_distributions
from orchestration.commands.evaluate import evaluate
from orchestration.commands.lane import LOG_FILE
from orchestration.config.messages import in_one_line
from orchestration.reports.asked import Asked, asked_of
from orchestration.results.label_shift import file_name
from orchestration.results.saved_run import stages_to_measure
from orchestration.storage.files import read_json
from orchestration.studies.grid import label_of
from orchestration.studies.run_queue import FINISHED
from orchestration.studies.study_folder import StudyFolder

_SPLIT = "test"


def evaluate_asked(folder: StudyFolder, say: Callable[[str], None]) -> None:
    """Measure finished runs as the study asks, those alone that were not measured so; a failure costs a line.

    Args:
        folder: of the study.
        say: takes a line for each run.
    """
    asked = asked_of(folder.content.get("report"), str(folder.path))
    for run, weights, names in _wanted(folder, asked):
        try:
            if _measured(run, weights, asked.model, names):
                continue
            _measure(run, weights, asked.model, names)
            say(f"{run.name}: measured with {weights} weights on test distributions {', '.join(names)}")
        except Exception as problem:  # the runs are trained, and the report goes on without it
            say(f"{run.name}: not measured with {weights} weights ({in_one_line(problem)})")


def _wanted(folder: StudyFolder, asked: Asked) -> Iterator[tuple[Path, str, list[str]]]:
    """Yield finished runs, each with a rule of weights and the names of all distributions asked of it."""
    for weights in dict.fromkeys(one.weights for one in asked.evaluate):
        for record in folder.records:
            if record["role"] != "run" or record["status"] != FINISHED:
                continue
            own = [one for one in asked.evaluate if one.weights == weights
                   and label_of(one.recipe.split()).items() <= record["label"].items()]  # fmt: skip
            names = dict.fromkeys(name.strip() for one in own for name in one.distribution.split(","))
            if names:
                yield folder.path / record["run"], weights, list(names)


def _measure(run: Path, weights: str, model: str, names: list[str]) -> None:
    """Measure a run; what is printed goes to its log.

    Raises:
        OSError: the numbers could not be saved.
    """
    with open(run / LOG_FILE, "a") as log, contextlib.redirect_stderr(log):
        text = evaluate(str(run), weights, model, ",".join(names), _SPLIT, [])
        print(text, file=log)
    if not _measured(run, weights, model, names):
        why = [line for line in text.splitlines() if line.startswith("not saved")]
        raise OSError("; ".join(why) or f"no {file_name(weights, model, _SPLIT)} in {run / 'evaluation'}")


def _measured(run: Path, weights: str, model: str, names: list[str]) -> bool:
    """Say whether every final stage of a run has a result of this rule and model on all these distributions."""
    for stage in stages_to_measure(str(run), None):
        try:
            found = read_json(run / "evaluation" / stage / file_name(weights, model, _SPLIT))
        except ValueError:  # damaged: measured again
            return False
        if [found.get(key) for key in ("rule", "weights", "split")] != [weights, model, _SPLIT]:
            return False
        # Distributions that this test set cannot have were asked for and are named in the file.
        if not _expanded(names, str(found.get("dataset"))) <= {
            *found.get("distributions", ()),
            *found.get("skipped", ()),
        }:
            return False
    return True


def _expanded(names: list[str], dataset: str) -> set[str]:
    """Return the names of distributions, those that were published for a data set in the place of `published`."""
    plain = {parse_distribution(name).name for name in names if name != "published"}
    return plain | {one.name for one in published_distributions(dataset) if "published" in names}
