"""The contents of a run folder as MLflow stores them: parameters, metric keys, files and names."""

from __future__ import annotations

import json

import pytest

from orchestration.config.compose import compose
from orchestration.config.identity import deciding_keys
from orchestration.tracking import contents as tracking_contents


def test_parameters_are_flat_short_and_without_secrets():
    config = {"a": {"b": 1, "empty": {}, "list": [1, 2]}, "long": "x" * 999, "none": None, "uri": "http://u:p@h"}
    found = tracking_contents.parameters(config, {"config_hash": "of an earlier version"})
    assert found.pop("long").endswith(" ... see config.yaml")
    assert found == {"a.b": "1", "a.empty": "{}", "a.list": "[1, 2]", "none": "null", "uri": "http://h"}


def test_parameters_are_those_that_decide_the_result_and_each_changes_with_its_key():
    """A run and the same with one key changed differ in exactly that parameter; in none, where it decides nothing."""
    words = ["method=ride", "mix=cmo", "dataset=cifar100_lt", "then=crt"]

    def of(*more):
        config = compose([*words, *more]).config
        return tracking_contents.parameters(config.model_dump(mode="json"), {"parameters": deciding_keys(config)})

    plain = of()
    assert len(plain) <= 42 and plain["seed"] == "0" and plain["method.stages.train.mixing.name"] == "cmo"
    changed = {
        "seed": "1", "method.stages.train.optimizer.lr": "0.05", "method.stages.train.batch_size": "64",
        "method.stages.train.optimizer.momentum": "0.8", "dataset.imbalance_ratio": "50.0", "run.max_steps": "9",
        "method.stages.train.objective.diversity_factor": "-0.1", "run.select_on": "test", "backbone.depth": "20",
        "method.stages.crt.optimizer.weight_decay": "0.001",
    }  # fmt: skip
    for key, value in changed.items():
        assert of(f"{key}={value}") == plain | {key: value}
    for word in ("cluster.workers=3", "tracking.experiment=x", "run.pictures=false", "dataset.loader_processes=2"):
        assert of(word) == plain
    assert tracking_contents.parameters({"seed": 0}, {}) == {}, "not known yet"


@pytest.mark.parametrize(
    ("stage", "stages", "expected"),
    [("train", ["train"], "train/loss"), ("train", [], "train/loss"), ("two", ["one", "two"], "two/train/loss")],
)
def test_metrics_of_several_stages_do_not_share_a_key(stage, stages, expected):
    assert tracking_contents.metric_key("train/loss", stage, stages) == expected


def test_the_config_is_sent_without_secrets(tmp_path):
    (tmp_path / "config.yaml").write_text("tracking:\n  uri: http://me:s3cret@h\n")
    assert tracking_contents.files(tmp_path) == {"config.yaml": "tracking:\n  uri: http://h\n"}
    assert tracking_contents.model_name({"dataset": {"name": "d"}, "method": {"name": "m"}}, "e") == "e-d"
    assert tracking_contents.model_name({}, "e") == "e"
    assert tracking_contents.model_name({}, "/Users/a:b") == "_Users_a_b"
    assert tracking_contents.model_name({}, "../a") == "_._a"


def test_a_run_knows_the_study_around_it(tmp_path):
    (tmp_path / "run").mkdir()
    assert tracking_contents.study_folder(tmp_path / "run") is None
    (tmp_path / "run" / "run.json").write_text('{"study": "all"}')
    assert tracking_contents.study_folder(tmp_path / "run") is None  # it was moved out of its study
    (tmp_path / "study.json").write_text("{}")
    assert tracking_contents.study_folder(tmp_path / "run") == tmp_path


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


def with_finals(run_dir):
    """Make a run whose stages ncm and crt are both final; ncm chose a number."""
    (run_dir / "config.yaml").write_text(
        "method: {stages: {train: {}, ncm: {}, crt: {}, part: {classes: {group: few}}}}"
    )
    choice = {"key": "head.tau", "value": 0.5, "split": None, "origin": "x", "published": 0.5, "tried": []}
    for stage, step, fitted in (("ncm", 0, {"choices": [choice]}), ("crt", 7, {}), ("part", 1, {})):
        for which in ("last", "best"):
            path = run_dir / "evaluation" / stage / f"{which}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            member = {"top1": {"all": 0.5}, "per_class": [0.5, step / 10]}
            path.write_text(json.dumps(
                {"stage": stage, "step": step, "fitted": fitted, "members": {"ensemble": member}}
            ))  # fmt: skip
            for folder in (run_dir / "export" / stage / which, *([run_dir / "export" / which] * (stage == "crt"))):
                folder.mkdir(parents=True)
                for name in ("model.json", "model.safetensors"):
                    (folder / name).write_text(f"{stage} {which}")
    (run_dir / "evaluation" / "last.json").write_text((run_dir / "evaluation" / "crt" / "last.json").read_text())
    (run_dir / "data.json").write_text('{"counts": [9, 3]}')
    return run_dir


def test_models_of_several_final_stages_have_names_of_their_own(tmp_path):
    found = tracking_contents.exported_models(with_finals(tmp_path))
    assert list(found) == ["ncm-last", "ncm-best", "crt-last", "crt-best", "last", "best"]
    assert found["last"][1] == found["crt-last"][1] != found["ncm-last"][1]
    steps = {name: tracking_contents.model_step(tmp_path, folder) for name, (folder, _) in found.items()}
    assert steps == {"ncm-last": 0, "ncm-best": 0, "crt-last": 7, "crt-best": 7, "last": 7, "best": 0}


def test_numbers_that_were_chosen_are_parameters_and_classes_have_a_column_per_final_stage(tmp_path):
    assert tracking_contents.fitted_parameters(with_finals(tmp_path)) == {
        "fitted.ncm.head.tau": "0.5",
        "fitted.ncm.head.tau.chosen_on": "published default, no validation split",
    }
    table = json.loads(tracking_contents.files(tmp_path)["per_class.json"])
    assert table["columns"][-4:] == [f"{s}/{w}/ensemble" for s in ("ncm", "crt") for w in ("last", "best")]
    assert [row[-4:] for row in table["data"]] == [[0.5] * 4, [0.0, 0.0, 0.7, 0.7]]


def test_the_description_of_a_study_begins_with_links_and_answers_and_ends_with_a_whole_paragraph(tmp_path):
    (tmp_path / "study.json").write_text("{}")
    assert tracking_contents.note(tmp_path) is None
    (tmp_path / "report").mkdir()
    text = "# s\n\n## data\n\n- Best over all: ce 1.\n- Best on few-shot classes: ce 2.\n\n" + "a b c\n\n" * 2000
    (tmp_path / "report" / "report.md").write_text(text)
    found = tracking_contents.note(tmp_path, "[Report](#/x)")
    assert found.startswith("[Report](#/x)\n\n- Best over all: ce 1.\n- Best on few-shot classes: ce 2.\n\n# s")
    assert 4800 < len(found) <= 5000 and found.endswith("a b c")
    (tmp_path / "report" / "report.md").write_text("# s\n\na b c\n\n### Cut off\n\n" + "x " * 4000)
    assert tracking_contents.note(tmp_path) == "# s\n\na b c", "no heading of what is cut off"
    (tmp_path / "report" / "report.md").write_text("# s\n\nd e f\n")
    assert tracking_contents.note(tmp_path) == "# s\n\nd e f"
