"""Names and paths are taken as typed."""

from __future__ import annotations

import pytest

from orchestration.config.compose import compose, from_yaml, load_config, to_yaml
from orchestration.config.text_keys import is_text


@pytest.mark.parametrize(
    "name",
    ["2e57342", "20240101", "1.10", "true", "0x1F", "1_000", "a,b", "[a]", "{b}", "nan", "a ", " a", "sort(a)"],
)
def test_a_name_is_a_name_whatever_it_looks_like(tmp_path, name):
    config = load_config(["method=ce", f"run.name={name}", f"run.dir={tmp_path}/{name}", f"dataset.root=/d/{name}"])
    assert (config.run_name, config.run.dir) == (name, f"{tmp_path}/{name}")
    assert config.dataset.root == f"/d/{name}"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config


def test_null_and_quotes_keep_their_meaning():
    assert load_config(["method=ce", "run.name=null"]).run_name == "ce-digits_lt-s0"
    assert load_config(["method=ce", "run.name='null'"]).run_name == "null"


@pytest.mark.parametrize("key", ["run.name", "run.dir", "dataset.root", "tracking.uri", "tracking.experiment"])
def test_a_shell_variable_that_is_not_set_gives_no_name(key):
    """The folder of `run.dir=` would be the current one."""
    with pytest.raises(ValueError, match=f"{key}=: needed something behind the =; null stands for nothing"):
        load_config(["method=ce", f"{key}="])


def test_numbers_and_choices_are_no_text():
    assert is_text(["method", "stages", "train", "start_from", "run"])
    assert not any(map(is_text, (["seed"], ["run", "max_steps"], ["cluster", "experts_per_worker"], ["a", "b"])))


def test_variables_of_mlflow_are_defaults_and_said(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@host:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    composed = compose(["method=ce", "tracking.experiment=other"])
    assert composed.config.tracking.uri == "http://me:s3cret@host:5000"
    assert composed.config.tracking.experiment == "other"
    assert composed.notes == ("tracking.uri = http://host:5000 (from MLFLOW_TRACKING_URI)",)
