"""Finished runs from elsewhere become runs of a study if they are the same, whole, and of the same data."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml

from experts.data.dataset import selection_digest
from orchestration.commands.study import plan_study
from orchestration.config.compose import from_yaml
from orchestration.storage.checkpoint import Checkpoints, write_tensors
from orchestration.studies.adoption import carry_out, find, take_over
from orchestration.studies.grid import lay_out
from orchestration.studies.run_queue import FINISHED, WAITING
from orchestration.studies.status import status_text
from orchestration.studies.study_config import read_study
from orchestration.studies.study_folder import StudyFolder
from orchestration.tracking.ownership import settle_ownership
from tests.finished_runs import WORDS, finish

COUNTS = (120, 86, 61, 44, 31, 22, 16, 11, 8, 6)


def finished(folder, *words):
    """Write a finished run with checkpoints of all its stages and the digest of its data."""
    finish(folder, *words, accuracy=[0.5] * 10, counts=COUNTS, predictions=False)
    config = from_yaml(folder / "config.yaml")
    data = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(data | {"digest": selection_digest(config.dataset)}))
    checkpoints = Checkpoints(folder, list(config.method.stages))
    for stage in config.method.stages:
        writing = checkpoints.begin()
        entries = [write_tensors(writing, "trunk", {"w": torch.arange(3.0)})]
        checkpoints.complete(writing, checkpoints.name(stage, 9), entries, {"step": 9, "total_steps": 9, "best": None})
    return folder


class Study:
    """A study of cross-entropy on digits in a folder, and what its next start says and takes over."""

    def __init__(self, tmp_path, *words):
        self.words = [*WORDS, f"run.dir={tmp_path / 'runs'}", "study.name=s", *(words or ["method=ce"])]
        self.path = tmp_path / "runs" / "s"

    def start(self, *adopt):
        grid = lay_out(read_study([*self.words, *(f"study.adopt={folder}" for folder in adopt)]))
        folder = StudyFolder(grid.folder)
        points = folder.take(grid)
        assert folder.settle(points, retry=False) == []
        self.said = []
        self.lent = carry_out(find(grid.study.adopt, folder), folder, points, grid.defaults, self.said.append)
        return {record["run"]: record for record in json.loads((self.path / "study.json").read_text())["points"]}


def test_a_run_from_elsewhere_becomes_the_run_that_it_is_and_says_where_it_came_from(tmp_path):
    old = finished(
        tmp_path / "elsewhere" / "old", "method=ce", "cluster.workers=1", "run.log_interval_s=7", "dataset.root=/gone"
    )
    settle_ownership(old)
    tracked = json.loads((old / "tracking.json").read_text())
    (old / "tracking.json").write_text(json.dumps(tracked | {"store": {"key": "k", "run_id": "r"}}))
    study = Study(tmp_path)
    record = study.start(old.parent)["ce-s0"]
    origin = {"run": "old", "folder": str(old.parent), "commit": "c0ffee"}
    assert record["status"] == FINISHED and record["adopted"] == origin and record["attempts"] == 0
    assert study.said == [f"taken over: 1 finished run of {old.parent}"]
    assert "ce-s0: taken over from elsewhere/old (c0ffee)" in status_text(study.path)

    ours = study.path / "ce-s0"
    for name in ("evaluation/last.json", "data.json", "checkpoints/00-train-00000009/trunk.safetensors"):
        assert (ours / name).read_bytes() == (old / name).read_bytes()
    config = from_yaml(ours / "config.yaml")
    assert (config.run.dir, config.run.name) == (str(study.path), "ce-s0") and config.run.log_interval_s == 7
    assert config.tracking.experiment == "s"
    assert settle_ownership(ours).endswith("this copy gets an MLflow run of its own")
    assert settle_ownership(old) is None

    assert find([str(old.parent)], StudyFolder(study.path)).donors == [], "what was taken over is not read again"
    before = (ours / "run.json").stat().st_mtime_ns
    shutil.rmtree(old.parent)
    again = Study(tmp_path)
    again.path.rename(tmp_path / "runs" / "moved")
    (tmp_path / "runs" / "moved").rename(again.path)
    (tmp_path / "empty").mkdir()
    finished(tmp_path / "empty" / "other", "method=ldam")
    assert again.start(tmp_path / "empty")["ce-s0"] == record
    assert (ours / "run.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        ("method=ride", None),
        ("method=tade", "it learnt from another run called T-s0 than the study has"),
        (None, "it learnt from T-s0, which is not beside it, so that it cannot be compared"),
    ],
)
def test_a_run_that_learnt_from_another_is_taken_only_where_that_one_is_the_same(teacher, line, tmp_path):
    student = "method=ride_distill method.stages.train.teachers.teacher.run=sibling:T"
    recipes = [{"label": "T", "words": "method=ride"}, {"label": "S", "words": student}]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"recipes": recipes}))
    old = finished(tmp_path / "elsewhere" / "mine", *student.split()[:1], f"{student.split()[1]}-s0")
    if teacher:
        finished(tmp_path / "elsewhere" / "T-s0", teacher)
    study = Study(tmp_path, f"study={tmp_path / 's.yaml'}")
    found = study.start(old.parent)
    assert found["S-s0"]["status"] == (WAITING if line else FINISHED)
    assert line is None or f"not taken over: {old}: {line}" in study.said
    assert study.lent == {}
    if not line:  # its copy has its teacher beside it, too
        config = from_yaml(study.path / "S-s0" / "config.yaml")
        assert config.method.stages["train"].teachers["teacher"].folder(config.run.dir) == study.path / "T-s0"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["method.stages.train.optimizer.lr=0.05"], "as ce-s0: method.stages.train.optimizer.lr: 0.05 -> 0.1"),
        (["dataset.imbalance_ratio=19"], "as ce-s0: dataset.imbalance_ratio: 19.0 -> 20.0"),
        (["run.evaluate_every_epochs=3"], "as ce-s0: run.evaluate_every_epochs: 3 -> 1"),
        (["seed=1"], None),
    ],
)
def test_a_run_that_differs_in_one_key_that_decides_is_not_taken(words, line, tmp_path):
    old = finished(tmp_path / "elsewhere" / "ce", "method=ce", *words)
    study = Study(tmp_path)
    assert study.start(old.parent)["ce-s0"]["status"] == WAITING
    assert study.said == ([f"not taken over: {old} {line}"] if line else [])
    assert not (study.path / "ce-s0").exists()


def test_keys_that_are_newer_than_a_run_count_with_their_defaults(tmp_path):
    old = finished(tmp_path / "elsewhere" / "old", "method=ce")
    tree = yaml.safe_load((old / "config.yaml").read_text())
    del tree["engine"]["memory_format"], tree["dataset"]["val_per_class"]
    (old / "config.yaml").write_text(yaml.safe_dump(tree))
    assert Study(tmp_path).start(old.parent)["ce-s0"]["status"] == FINISHED


def test_threads_that_a_study_leaves_open_are_those_of_the_run(tmp_path):
    old = finished(tmp_path / "elsewhere" / "old", "method=ce", "engine.threads=3")
    assert Study(tmp_path).start(old.parent)["ce-s0"]["status"] == FINISHED
    one = Study(tmp_path / "b", "method=ce", "engine.threads=1")
    assert one.start(old.parent)["ce-s0"]["status"] == WAITING
    assert one.said == [f"not taken over: {old} as ce-s0: engine.threads: 3 -> 1"]


def damage_checkpoint(run):
    path = run / "checkpoints" / "00-train-00000009" / "trunk.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")


def end_early(run):
    (run / "run.json").write_text(json.dumps({"status": "failed"}))


def damage_config(run):
    (run / "config.yaml").write_text("method: {nonsense: 1}")


def damage_evaluation(run):
    (run / "evaluation" / "last.json").write_text("{")


def lose_data(run):
    (run / "data.json").unlink()


def see_other_data(run):
    (run / "data.json").write_text((run / "data.json").read_text().replace('"digest": "', '"digest": "0'))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (damage_checkpoint, "trunk.safetensors: sha256 .* needed"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "stage train has no checkpoint of its end"),
        (end_early, r"not finished \(failed\)"),
        (damage_config, "config.yaml.*nonsense"),
        (damage_evaluation, "last.json: not valid JSON"),
        (lose_data, "data.json is missing, or says nothing about the run's images"),
        (see_other_data, "trained on other images than those at"),
    ],
    ids=["checkpoint", "no checkpoint", "unfinished", "config", "evaluation", "no data", "data"],
)
def test_a_run_that_is_damaged_unfinished_or_of_other_data_is_named_and_stays_out(harm, why, tmp_path):
    old = finished(tmp_path / "elsewhere" / "old", "method=ce")
    harm(old)
    study = Study(tmp_path)
    assert study.start(old.parent)["ce-s0"]["status"] == WAITING
    assert re.fullmatch(rf"not taken over: {old}: .*{why}.*", study.said[0]) and len(study.said) == 1
    assert sorted(path.name for path in study.path.iterdir()) == ["study.json"]


def killed(*_, **__):
    raise KeyboardInterrupt


def killed_after(*arguments):
    take_over(*arguments)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("function", "instead"),
    [("_in_study", killed), ("sync_folder", killed), ("take_over", killed_after)],
    ids=["while it copies", "before the copy has its name", "before study.json has it"],
)
def test_a_start_killed_while_it_takes_a_run_over_is_made_good_by_the_next(function, instead, tmp_path, monkeypatch):
    old = finished(tmp_path / "elsewhere" / "old", "method=ce")
    study = Study(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(f"orchestration.studies.adoption.{function}", instead)
        with pytest.raises(KeyboardInterrupt):
            study.start(old.parent)
    record = study.start(old.parent)["ce-s0"]
    assert record["status"] == FINISHED and record["adopted"]["run"] == "old"
    assert sorted(path.name for path in study.path.iterdir()) == ["ce-s0", "study.json"]


def test_a_run_whose_images_are_not_here_is_taken_and_that_is_said(tmp_path, monkeypatch):
    old = finished(tmp_path / "elsewhere" / "old", "method=ce")
    monkeypatch.setattr("orchestration.studies.adoption._digest_here", lambda *_: None)
    study = Study(tmp_path)
    assert study.start(old.parent)["ce-s0"]["status"] == FINISHED
    assert study.said[0] == "images of 1 run are not here, and were not compared"


def test_the_password_of_a_tracking_server_stays_out_of_a_run_that_is_taken_over(tmp_path):
    finished(tmp_path / "elsewhere" / "old", "method=ce")
    study = Study(tmp_path, "method=ce", "tracking.enabled=true", "tracking.uri=http://me:secret@server:5000")
    study.words.remove("tracking.enabled=false")
    assert study.start(tmp_path / "elsewhere")["ce-s0"]["status"] == FINISHED
    text = (study.path / "ce-s0" / "config.yaml").read_text()
    assert "server:5000" in text and "secret" not in text


def test_of_two_runs_that_are_the_same_one_is_taken_and_the_other_named(tmp_path):
    first, second = (finished(tmp_path / "elsewhere" / name, "method=ce") for name in ("a", "b"))
    study = Study(tmp_path)
    assert study.start(first.parent)["ce-s0"]["adopted"]["run"] == "a"
    assert study.said[0] == f"not taken over: {second}: the same run as {first}, which is taken"


def test_a_plan_says_what_would_be_taken_over_and_copies_nothing(tmp_path):
    finished(tmp_path / "elsewhere" / "ldam", "method=ldam")
    finished(tmp_path / "elsewhere" / "ce", "method=ce", "then=[joint,las]")
    study = Study(tmp_path, "method=crt,ldam")
    text = plan_study([*study.words, f"study.adopt={tmp_path / 'elsewhere'}"])
    assert "runs      2 runs: 0 finished, 1 to take over, 1 to train" in text
    assert "lent      1 stage, trained by 1 run elsewhere" in text and not study.path.exists()


def test_a_run_whose_copy_was_removed_is_taken_over_again_and_not_trained(tmp_path):
    old = finished(tmp_path / "elsewhere" / "old", "method=ce")
    study = Study(tmp_path)
    first = study.start(old.parent)
    shutil.rmtree(study.path / "ce-s0")
    plan = plan_study([*study.words, f"study.adopt={old.parent}"])
    assert "runs      1 run: 0 finished, 1 to take over, 0 to train" in plan
    assert "runs      1 run: 0 finished, 1 to train" in plan_study(study.words), "no donor, no result"
    assert study.start(old.parent) == first
    assert study.said == [f"taken over: 1 finished run of {old.parent}"]
    assert (study.path / "ce-s0" / "evaluation" / "last.json").exists()


def test_a_run_that_has_begun_in_the_study_goes_on_there(tmp_path):
    old = finished(tmp_path / "elsewhere" / "old", "method=ce")
    study = Study(tmp_path)
    study.start(finished(tmp_path / "b" / "ldam", "method=ldam"))
    begun = finished(study.path / "ce-s0", "method=ce")
    end_early(begun)
    assert study.start(old.parent)["ce-s0"]["status"] == WAITING
    assert study.said == [f"not taken over: {old}: ce-s0 has begun here, and goes on"]


def test_a_stage_is_lent_by_a_run_that_trained_it_unless_its_checkpoint_is_damaged(tmp_path):
    old = finished(tmp_path / "elsewhere" / "old", "method=ce", "then=[joint,las]")
    study = Study(tmp_path, "method=ce,crt,ldam")
    records = study.start(old.parent)
    assert {record["status"] for record in records.values()} == {WAITING}
    assert list(study.lent.values()) == [old] and study.said == ["lent: 1 stage by 1 run"]
    points = lay_out(read_study(study.words)).points
    assert [bool(set(point.stages.values()) & set(study.lent)) for point in points] == [True, True, False]
    damage_checkpoint(old)
    study.start(old.parent)
    assert study.lent == {} and "stage train not taken over" in study.said[0]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"study\.adopt = .*nowhere: nothing there; needed a folder of finished runs"):
        find([str(tmp_path / "nowhere")], StudyFolder(tmp_path))
    with pytest.raises(ValueError, match="holds no run"):
        find([str(tmp_path)], StudyFolder(tmp_path))
    assert read_study(["method=ce", "study.adopt=a,b"]).adopt == ("a", "b")
