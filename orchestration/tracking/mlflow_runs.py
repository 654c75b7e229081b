"""Finds, or makes, experiments and runs in an MLflow store. No two processes make the same one twice.

A run is found by the key that it carries. The key is on disk, in `tracking.json`, before the run is made, so the run is
found again whatever was killed when. A second run of a key, made by a request whose answer came late, is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experts.data.names import readable
from orchestration.storage.study_file import STUDY_FILE, read_study_file
from orchestration.tracking import contents
from orchestration.tracking.headline import experiment_tags, grouped_by_index
from orchestration.tracking.ownership import copied_from
from orchestration.tracking.process import STATE_FILE, State, Target, need_lock, user_name
from orchestration.tracking.study_rows import StudyRow
from orchestration.tracking.uri import artifact_folder

KEY, PARENT = "expertail.key", "mlflow.parentRunId"
_WAIT_S = 30.0  # for another process that makes runs of the same folder


def find_experiment(client: Any, target: Target, folder: Path) -> str:
    """Return the id of an experiment, made if missing, with saved views of the headline metrics.

    Args:
        client: of the store.
        target: names the experiment.
        folder: of the run or the study that asks; beside it a database that is no file keeps artifacts.
    """
    from mlflow.exceptions import MlflowException

    name = readable(target.experiment)  # no store takes bytes that are no text
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            views = _views(folder, grouped_by_index(_runs(folder)))
            kind = {"mlflow.experimentKind": "custom_model_development"}  # else the pages are those of chat models
            return str(client.create_experiment(name, artifact_folder(target.uri, folder.parent), kind | views))
        except MlflowException:  # another run was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    update_views(client, experiment, folder)
    return str(experiment.experiment_id)


def update_views(client: Any, experiment: Any, folder: Path) -> None:
    """Bring an experiment's saved views up to what the data of a run or a study say, as soon as these are known."""
    by_index = grouped_by_index(_runs(folder))
    for key, value in _views(folder, by_index).items():
        before = experiment.tags.get(key)
        if before is None or (by_index is not None and before != value):
            client.set_experiment_tag(experiment.experiment_id, key, value)


def _views(folder: Path, by_index: bool | None) -> dict[str, str]:
    of_study = (folder / STUDY_FILE).exists() or contents.study_folder(folder) is not None
    return experiment_tags(of_study, by_index=bool(by_index))


def _runs(folder: Path) -> list[Path]:
    """Return the runs that share an experiment with a run or a study, as far as its folder tells."""
    study = folder if (folder / STUDY_FILE).exists() else contents.study_folder(folder)
    return [folder] if study is None else [study / one["run"] for one in read_study_file(study).get("points", ())]


def find_run(
    client: Any, experiment_id: str, folder: Path, state: State, target: Target, tags: Mapping[str, str]
) -> str:
    """Return the id of the one MLflow run of a folder, made if missing.

    Args:
        client: of the store.
        experiment_id: where the run is.
        folder: of a run or a study.
        state: what the folder remembers of the store; changed, and written to disk.
        target: names the run.
        tags: of the run if it is made; a parent is set in any case.

    Raises:
        TimeoutError: another process makes runs of the folder and does not end; nothing was made.
    """
    with need_lock(folder / f".{STATE_FILE}.run.lock", wait_s=_WAIT_S):  # runs side by side make their study's once
        state.agree_on_key()
        values = state.values
        created = contents.time_ms(contents.describe_folder(folder)[0], "created")
        run_id, is_new = _find(
            client, experiment_id, values["key"], target.run_name, {**tags, **copied_from(folder)}, created,
            values.get("run_id"),
        )  # fmt: skip
        if is_new:
            values["files"] = {}  # a new run has none of them
        values.update(experiment=target.experiment, experiment_id=experiment_id, run_id=run_id)
        state.save()
    return run_id


def find_row(client: Any, experiment_id: str, study: Path, state: State, row: StudyRow) -> str:
    """Return the id of the MLflow run of a row of a study, made if missing: the parent of the row's runs.

    Its key is made of the study's, so a copy of the study has rows of its own.

    Args:
        client: of the store.
        experiment_id: where the run is.
        study: folder of the study.
        state: what that folder remembers of the store.
        row: one of the study's.

    Raises:
        TimeoutError: as `find_run`.
    """
    with need_lock(study / f".{STATE_FILE}.run.lock", wait_s=_WAIT_S):
        state.agree_on_key()
        key = f"{state.values['key']}/{row.name}"
        created = contents.time_ms(contents.times(study, row.runs), "created")
        return _find(client, experiment_id, key, row.name, copied_from(study), created)[0]


def _find(
    client: Any, experiment_id: str, key: str, name: str, tags: Mapping[str, str], created: int | None,
    known: str | None = None,
) -> tuple[str, bool]:  # fmt: skip
    """Return the id of the one run with a key, and whether it was made now; the lock of its folder is held."""
    found = {str(run.info.run_id): run for run in client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'")}
    if not found:
        tags = {KEY: key, "mlflow.user": user_name(), **tags}
        return str(client.create_run(experiment_id, created, tags, name).info.run_id), True
    run_id = known if known is not None and known in found else min(found)
    for stray in found.keys() - {run_id}:
        client.delete_run(stray)
    parent = tags.get(PARENT)
    if parent is not None and found[run_id].data.tags.get(PARENT) != parent:
        client.set_tag(run_id, PARENT, parent)
    return run_id, False
