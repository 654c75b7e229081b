"""What a study measures once its runs have ended: the key `evaluate` of its `report`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestration.commands.evaluate import evaluate
from orchestration.commands.lane import LOG_FILE
from orchestration.config.messages import in_one_line
from orchestration.reports.asked import Evaluation, asked_of
from orchestration.studies.grid import label_of
from orchestration.studies.run_queue import FINISHED
from orchestration.studies.study_folder import StudyFolder


def evaluate_asked(folder: StudyFolder, say: Callable[[str], None]) -> None:
    """Measure finished runs as the study asks, those alone that were not measured so; a failure costs a line.

    Args:
        folder: of the study.
        say: takes a line for each run.
    """
    for asked in asked_of(folder.content.get("report"), str(folder.path)).evaluate:
        for run in list(_left(folder, asked)):
            try:
                with open(run / LOG_FILE, "a") as log, contextlib.redirect_stderr(log):
                    print(evaluate(str(run), asked.weights, None, asked.distribution, "test", []), file=log)
                say(f"{run.name}: measured with {asked.weights} weights on test distributions {asked.distribution}")
            except Exception as problem:  # the runs are trained, and the report goes on without it
                say(f"{run.name}: not measured with {asked.weights} weights ({in_one_line(problem)})")


def _left(folder: StudyFolder, asked: Evaluation) -> Iterator[Path]:
    """Yield the folders of finished runs of a recipe that were not measured yet."""
    wanted = label_of(asked.recipe.split())
    for record in folder.records:
        run = folder.path / record["run"]
        measured = any((run / "evaluation").rglob(f"{asked.weights}*.json"))
        own = record["role"] == "run" and wanted.items() <= record["label"].items()
        if own and record["status"] == FINISHED and not measured:
            yield run
