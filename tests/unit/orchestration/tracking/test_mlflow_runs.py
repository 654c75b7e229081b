"""MLflow runs are made under a lock, or not at all. The store is a recording."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestration.storage.files import write_json
from orchestration.tracking import mlflow_runs
from orchestration.tracking.mlflow_runs import find_row, find_run, update_views
from orchestration.tracking.process import STATE_FILE, State, Target, hold_lock, is_permanent, schema_lock
from orchestration.tracking.study_rows import StudyRow

TARGET = Target("http://server:5000", "e", "r")


class Store:
    """A client without runs that counts those made."""

    def __init__(self):
        self.made = []

    def search_runs(self, experiments, query):
        return []

    def create_run(self, experiment_id, created, tags, name):
        self.made.append(name)
        raise InterruptedError("made")  # what follows is not looked at


@pytest.mark.parametrize("kind", ["run", "row"])
def test_no_run_is_made_while_another_process_makes_it_and_it_is_tried_again(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_runs, "_WAIT_S", 0.0)
    write_json(tmp_path / "run.json", {"status": "running"})
    store, state = Store(), State(tmp_path, TARGET)

    def find():
        if kind == "run":
            return find_run(store, "0", tmp_path, state, TARGET, {})
        return find_row(store, "0", tmp_path, state, StudyRow("row", {}, "run", {}, "running"))

    held = hold_lock(tmp_path / f".{STATE_FILE}.run.lock", wait_s=0)
    with held, pytest.raises(TimeoutError, match=r"run.lock: another process has kept it locked for 0 s") as refused:
        find()
    assert store.made == [] and not is_permanent(refused.value)
    with pytest.raises(InterruptedError):
        find()
    assert len(store.made) == 1


def test_two_processes_never_build_the_tables_of_one_store(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestration.tracking.process._SCHEMA_WAIT_S", 0.0)
    refused = pytest.raises(TimeoutError)
    with schema_lock("postgresql://host/db", tmp_path), refused, schema_lock("postgresql://host/db", tmp_path):
        raise AssertionError("entered without the lock")
    with schema_lock("postgresql://host/db", tmp_path):
        pass


def test_views_follow_the_data_of_a_study_once_they_are_known(tmp_path):
    """Two runs, of which the first has not read its data; afterwards nothing is sent again."""
    write_json(tmp_path / "study.json", {"points": [{"run": "a-s0"}, {"run": "a-s1"}]})
    tags = {}
    store = SimpleNamespace(set_experiment_tag=lambda _, key, value: tags.update({key: value}))
    experiment = SimpleNamespace(experiment_id="0", tags=tags)
    key = "mlflow.experiment.primaryMetric.name"
    update_views(store, experiment, tmp_path)
    assert tags[key] == "final/few"
    run = tmp_path / "a-s1"
    run.mkdir()
    write_json(run / "data.json", {"groups": {"by_count": {"few": []}, "by_index": {"few": [7]}}})
    write_json(run / "run.json", {"study": tmp_path.name})
    update_views(store, experiment, run)  # a run of the study
    assert tags[key] == "final/few_by_index" and "final/few`" not in "".join(tags.values())
    (run / "data.json").unlink()
    update_views(store, experiment, tmp_path)  # not known any more: they stay
    assert tags[key] == "final/few_by_index"
