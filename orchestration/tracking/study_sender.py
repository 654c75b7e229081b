"""Sends the numbers of a study to MLflow: totals; means, spreads and states of runs that differ in their seed alone.

Everything is computed from the run folders each time and sent where the store has something else, so it does not matter
what was lost or sent before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experts.data.names import readable
from orchestration.config.paths import sibling_of
from orchestration.storage.files import CONFIG, DATA, RUN, read_config, read_json
from orchestration.storage.study_file import read_study_file
from orchestration.tracking import contents
from orchestration.tracking.headline import totals
from orchestration.tracking.mlflow_runs import find_row
from orchestration.tracking.process import State, chunks, file_version
from orchestration.tracking.study_rows import StudyRow, rows_of


class StudySender:
    """The numbers of one study in one store.

    Args:
        client: of the store.
        experiment_id: where the study is.
        run_id: of the study's own run.
        folder: of the study.
        state: what the folder remembers of the store.
    """

    def __init__(self, client: Any, experiment_id: str, run_id: str, folder: Path, state: State) -> None:
        self._client, self._experiment_id, self._folder, self._state = client, experiment_id, folder, state
        self._run_id = run_id
        self._ids: dict[str, str] = {}
        self._sent: dict[str, Any] = {}  # by row: what it was made of when it was last sent
        self._totals: dict[str, float] = {}
        self._costs: dict[str, tuple[Any, Mapping[str, float]]] = {}  # by run, with the version of its file

    def send(self, ended: str | None = None) -> None:
        """Send what has changed of the totals, and of every row that has begun.

        Args:
            ended: status, in MLflow's word, of rows that the study calls running, where nobody trains it any more.
        """
        study = read_study_file(self._folder)
        if (found := totals(study, self._cost)) != self._totals:
            if metrics := _changed(found, self._client.get_run(self._run_id)):
                self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            self._totals = found
        for row in rows_of(study):
            begun = [run for run in row.runs if (self._folder / run / CONFIG).exists()]
            made_of = (row, ended, [file_version(self._folder / run / RUN) for run in begun])
            if begun and self._sent.get(row.name) != made_of:
                self._send(row, self._folder / begun[0], ended)
                self._sent[row.name] = made_of

    def _cost(self, run: str) -> Mapping[str, float]:
        """Return the hours of a run, read again only when its file has changed."""
        path = self._folder / run / RUN
        version = file_version(path)
        if run not in self._costs or self._costs[run][0] != version:
            self._costs[run] = version, read_json(path).get("cost") or {}
        return self._costs[run][1]

    def _send(self, row: StudyRow, first: Path, ended: str | None) -> None:
        from mlflow.entities import Param, RunTag

        if row.name not in self._ids:
            self._ids[row.name] = find_row(self._client, self._experiment_id, self._folder, self._state, row)
        run_id = self._ids[row.name]
        known = self._client.get_run(run_id)
        metrics, seeds = row.summary(self._folder)
        changed = _changed(metrics, known)
        tags = [RunTag(k, v) for k, v in row_tags(row, first, seeds).items() if known.data.tags.get(k) != v]
        config, facts = read_config(first), read_json(first / RUN)
        params = {
            key: _of_every_seed(value, config["seed"])
            for key, value in contents.parameters(config, facts).items()
            if key != "seed" and key not in known.data.params
        }
        if changed or tags or params:
            self._client.log_batch(run_id, metrics=changed, tags=tags, synchronous=True)
            for chunk in chunks([Param(key, readable(value)) for key, value in params.items()], 100):
                self._client.log_batch(run_id, params=chunk, synchronous=True)
        self._set_status(run_id, known.info.status, row, ended)

    def _set_status(self, run_id: str, known: str, row: StudyRow, ended: str | None) -> None:
        status = contents.mlflow_status({"status": row.status})
        if status == "RUNNING" and ended is not None:
            status = ended
        if status == known:
            return
        if status == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        else:
            ended_at = contents.time_ms(contents.times(self._folder, row.runs), "ended")
            self._client.set_terminated(run_id, status, ended_at)


def _changed(metrics: Mapping[str, float], known: Any) -> list[Any]:
    """Return the metrics that are new to an MLflow run, or that it has with another value.

    All at step 0, as numbers that have no course: MLflow draws them as bars, one for each run.
    """
    from mlflow.entities import Metric

    now = round(time.time() * 1000)
    return [Metric(name, value, now, 0) for name, value in metrics.items() if known.data.metrics.get(name) != value]


def row_tags(row: StudyRow, first: Path, seeds: list[int]) -> dict[str, str]:
    """Return the tags of a row: those of its recipe, and the seeds that its means are of.

    Args:
        row: of the study.
        first: folder of a run of it.
        seeds: of its finished runs.
    """
    found = contents.recipe_tags(read_json(first / RUN), read_json(first / DATA), read_config(first))
    label = " ".join(f"{key}={value}" for key, value in row.label.items())
    found |= {"study": first.parent.name, "recipe": row.name, "label": label, "role": _role(row)}
    found |= {"seeds": ",".join(map(str, seeds)) or "none", "n": str(len(seeds))}
    found["mlflow.note.content"] = _note(seeds)
    return {key: readable(value)[:5000] for key, value in found.items() if value}


def _of_every_seed(value: Any, seed: int) -> Any:
    """Return a parameter of a run as one of its row: a sibling is the run with the same seed."""
    return value.removesuffix(f"-s{seed}") if isinstance(value, str) and sibling_of(value) else value


def _role(row: StudyRow) -> str:
    return "row" if row.role == "run" else row.role


def _note(seeds: list[int]) -> str:
    if not seeds:
        return "No run of this row has ended yet."
    one = len(seeds) == 1
    which = f"seed {seeds[0]}" if one else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
    spread = "" if one else "; `sd/...` are standard deviations"
    return f"Means over {which} of the runs below{spread}."
