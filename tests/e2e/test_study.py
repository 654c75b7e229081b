"""A study trains what single runs train, bit for bit, whatever is shared, warm or failing."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from orchestration.cli import main
from orchestration.config.compose import from_yaml
from tests import runs

pytestmark = pytest.mark.ray

WORDS = [
    "dataset=digits_lt", "dataset.image_size=8", "method.stages.train.batch_size=135", "method.stages.train.epochs=2",
    "method.stages.train.lr_schedule.milestones=[]", "tracking.enabled=false", "run.pictures=false",
]  # fmt: skip


def written(tmp_path, **content):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return [f"study={tmp_path / 'tiny.yaml'}", f"run.dir={tmp_path}", *WORDS]


def records(folder):
    return {record["run"]: record for record in json.loads((folder / "study.json").read_text())["points"]}


def alone(tmp_path, record, *more):
    """Train a run of a study by itself, with the words that study.json has for it."""
    assert main(["train", *record["words"], f"run.dir={tmp_path}", "run.name=alone", *more]) == 0
    return tmp_path / "alone"


def assert_equal(ours, single, momentum=True):
    """Compare two runs bit by bit; a stage that was taken over has no momentum."""
    assert runs.points(ours) == runs.points(single)
    theirs = {name: digest for name, digest in runs.weights(single).items() if momentum or ".momentum." not in name}
    assert runs.weights(ours) == theirs
    assert runs.exports(ours) == runs.exports(single)
    for name in ("last", "best"):
        assert (ours / "evaluation" / f"{name}.json").read_text() == (
            single / "evaluation" / f"{name}.json"
        ).read_text()


def test_runs_of_a_study_are_bitwise_those_of_single_runs_and_a_failure_costs_itself(warm, tmp_path, capsys):
    stages = "method.stages.{0}.epochs=1 method.stages.{0}.batch_size=135"
    recipes = [
        f"method=ce then=crt {stages.format('crt')}",
        f"method=ce then=lws {stages.format('lws')}",
        "method=ldam method.stages.train.optimizer.lr=1e30",
    ]
    words = [*written(tmp_path, recipes=recipes, baseline="method=ce then=crt"), "study.parallel=1"]
    assert main(["study", *words]) == 1
    folder, said = tmp_path / "tiny", capsys.readouterr()
    found = records(folder)
    crt, lws, failed = found
    assert [record["status"] for record in found.values()] == ["finished", "finished", "failed"]
    assert "not finite" in found[failed]["problem"] and "not finite" in said.out
    assert f"failed: {failed}; study.retry=failed" in said.err

    kept = {name: json.loads((folder / name / "run.json").read_text()) for name in (crt, lws)}
    assert kept[lws]["stages_taken"] == {"train": crt} and kept[lws]["study"] == "tiny"
    assert kept[lws]["command"].startswith("expertail train ") and f"run.name={lws}" in kept[lws]["command"]
    assert kept[crt]["workers"][0]["pid"] == kept[lws]["workers"][0]["pid"], "workers stay from run to run"
    assert kept[crt]["workers"][0]["device"] == "cpu"
    assert_equal(folder / lws, alone(tmp_path, found[lws]))

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}
    assert main(["study", *words]) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/run.json")} == before, "what has ended stays"
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    assert "3 runs; 2 finished, 1 failed" in capsys.readouterr().out
    assert main(["study", *written(tmp_path, recipes=recipes[:1])]) == 0
    assert "study tiny: 1 run, 1 finished, 0 to train" in (said := capsys.readouterr().err)
    assert "2 runs of the folder not asked for now, in its report all the same" in said


def test_a_run_waits_for_its_teacher_and_fails_with_it(warm, tmp_path):
    student = "method=ride_distill method.stages.train.teachers.teacher.run=sibling"
    recipes = [
        {"label": "student", "words": f"{student}:good"},
        {"label": "orphan", "words": f"{student}:bad"},
        {"label": "bad", "words": "method=ride method.stages.train.optimizer.lr=1e30"},
        {"label": "good", "words": "method=ride method.num_experts=2"},
    ]
    assert main(["study", *written(tmp_path, recipes=recipes)]) == 1
    found = records(tmp_path / "tiny")
    assert {run: record["status"] for run, record in found.items()} == {
        "student-s0": "finished", "orphan-s0": "failed", "bad-s0": "failed", "good-s0": "finished",
    }  # fmt: skip
    assert found["orphan-s0"]["problem"] == "it needs bad-s0, which has failed" and not found["orphan-s0"]["attempts"]
    # The same run by itself finds its teacher beside it; and the study may move.
    single = alone(tmp_path / "tiny", found["student-s0"])
    assert_equal(tmp_path / "tiny" / "student-s0", single)
    shutil.rmtree(single)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tiny").rename(tmp_path / "elsewhere" / "tiny")
    assert main(["study", *written(tmp_path, recipes=recipes), f"run.dir={tmp_path / 'elsewhere'}"]) == 1
    moved = tmp_path / "elsewhere" / "tiny"
    assert {run: one["status"] for run, one in records(moved).items()} == {r: one["status"] for r, one in found.items()}
    stored = from_yaml(moved / "student-s0" / "config.yaml")
    assert stored.method.stages["train"].teachers["teacher"].folder(stored.run.dir) == moved / "good-s0"


def test_finished_runs_and_stages_from_elsewhere_are_as_if_trained_in_the_study(warm, tmp_path):
    crt = ["then=[joint,crt]", "method.stages.crt.epochs=1", "method.stages.crt.batch_size=135"]
    elsewhere = tmp_path / "elsewhere"
    for method in ("ce", "ldam"):
        words = [f"method={method}", *crt, *WORDS, "cluster.cpus_per_worker=1"]
        assert main(["train", *words, f"run.dir={elsewhere}", f"run.name={method}"]) == 0

    words = written(tmp_path, recipes=[" ".join(["method=ce", *crt]), "method=ldam"])
    assert main(["study", *words, f"study.adopt={elsewhere}", "study.parallel=1"]) == 0
    folder, found = tmp_path / "tiny", records(tmp_path / "tiny")
    (whole, record), (lent, trained) = found.items()
    assert record["adopted"]["run"] == "ce" and (record["attempts"], trained["attempts"]) == (0, 1)
    assert_equal(folder / whole, elsewhere / "ce")
    run = json.loads((folder / lent / "run.json").read_text())
    commit = json.loads((elsewhere / "ldam" / "run.json").read_text())["commit"]
    assert run["stages_taken"] == {"train": f"elsewhere/ldam ({commit[:8]})"}
    single = alone(tmp_path, trained)
    assert_equal(folder / lent, single, momentum=False)
    assert '"adopted": {' in (folder / "report" / "report.json").read_text()
    assert "taken over from" in (folder / "report" / "report.md").read_text()
