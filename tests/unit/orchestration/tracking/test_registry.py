"""Which run of a study gets an alias. No store is asked: what a run has there is in its folder."""

from __future__ import annotations

import pytest

from orchestration.storage.files import write_json
from orchestration.tracking.process import State, Target
from orchestration.tracking.registry import best_of_study

URI = "http://server:5000"


def study_of(folder, *runs):
    """Write a study of finished runs: name, accuracy, digest of the data, registered model."""
    for number, (name, accuracy, digest, model) in enumerate(runs, 1):
        run = folder / name
        write_json_in(run / "run.json", {"status": "finished"})
        write_json_in(run / "data.json", {"digest": digest})
        best = {"selected_value": accuracy, "selected_on": "val"}
        write_json_in(run / "evaluation" / "best.json", best)
        state = State(run, Target(URI, "e", name))
        state.values["models"] = {"best": f"models:/{model}/{number}"}
        state.save()
    write_json_in(folder / "study.json", {"points": [{"run": name} for name, *_ in runs]})
    return folder


def write_json_in(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def test_runs_on_different_data_are_not_ranked(tmp_path):
    hard, easy = "a" * 64, "b" * 64
    runs = ("hard-s0", 0.5, hard, "e-d"), ("hard-s1", 0.6, hard, "e-d"), ("easy-s0", 0.9, easy, "e-d")
    study = study_of(tmp_path, *runs)
    told = r"e-d: runs saw different data \(hard-s0 on aaaaaaaa; easy-s0 on bbbbbbbb\).*promote a run by its folder"
    with pytest.raises(ValueError, match=told):
        best_of_study(study, URI, "", "best")


def test_each_registered_model_has_the_best_run_on_its_own_data(tmp_path):
    study = study_of(
        tmp_path, ("a-s0", 0.5, "a", "e-one"), ("b-s0", 0.9, "b", "e-two"), ("a-s1", 0.6, "a", "e-one"),
        ("a-s2", 0.6, "a", "e-one"),
    )  # fmt: skip
    found = best_of_study(study, URI, "", "best")
    assert [(one.run.name, one.accuracy, one.compared) for one in found] == [("a-s1", 0.6, 3), ("b-s0", 0.9, 1)]
