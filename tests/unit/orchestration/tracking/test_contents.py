"""The contents of a run folder as MLflow stores them: parameters, metric keys, files and names."""

from __future__ import annotations

import pytest

from orchestration.tracking import contents as tracking_contents


def test_parameters_are_flat_short_and_without_secrets():
    config = {"a": {"b": 1, "empty": {}, "list": [1, 2]}, "long": "x" * 999, "none": None, "uri": "http://u:p@h"}
    found = tracking_contents.parameters(config)
    assert found.pop("long").endswith(" ... see config.yaml")
    assert found == {"a.b": "1", "a.empty": "{}", "a.list": "[1, 2]", "none": "null", "uri": "http://h"}


@pytest.mark.parametrize(
    ("stage", "stages", "expected"),
    [("train", ["train"], "train/loss"), ("train", [], "train/loss"), ("two", ["one", "two"], "two/train/loss")],
)
def test_metrics_of_several_stages_do_not_share_a_key(stage, stages, expected):
    assert tracking_contents.metric_key("train/loss", stage, stages) == expected


def test_the_config_is_sent_without_secrets(tmp_path):
    (tmp_path / "config.yaml").write_text("tracking:\n  uri: http://me:s3cret@h\n")
    assert tracking_contents.files(tmp_path) == {"config.yaml": "tracking:\n  uri: http://h\n"}
    assert tracking_contents.model_name({"dataset": {"name": "d"}, "method": {"name": "m"}}, "e") == "d-m"
    assert tracking_contents.model_name({}, "e") == "e"


def test_a_run_knows_its_sweep_by_name(tmp_path):
    (tmp_path / "run").mkdir()
    assert tracking_contents.sweep_folder(tmp_path / "run") is None
    (tmp_path / "run" / "run.json").write_text('{"study": "all"}')
    assert tracking_contents.sweep_folder(tmp_path / "run") is None  # its folder is gone
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "sweep.json").write_text("{}")
    assert tracking_contents.sweep_folder(tmp_path / "run") == tmp_path / "all"


def test_a_run_is_running_until_its_folder_says_how_it_ended():
    words = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
    assert {word: tracking_contents.mlflow_status({"status": word}) for word in words} == words
    assert tracking_contents.mlflow_status({}) == "RUNNING"


def test_no_model_is_sent_where_the_config_says_so(tmp_path):
    export = tmp_path / "export" / "last"
    export.mkdir(parents=True)
    for name in ("model.json", "model.safetensors"):
        (export / name).write_text("{}")
    assert list(tracking_contents.exported_models(tmp_path)) == ["last"]
    (tmp_path / "config.yaml").write_text("tracking: {log_model: false}")
    assert tracking_contents.exported_models(tmp_path) == {}
