"""study.json keeps names and states; another study in the folder is refused with what differs."""

from __future__ import annotations

import fcntl
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestration.storage.files import read_json, write_json
from orchestration.studies import study_folder
from orchestration.studies.grid import lay_out
from orchestration.studies.lanes import PARENT_GONE_S
from orchestration.studies.run_queue import FAILED, FINISHED, WAITING
from orchestration.studies.status import status_text
from orchestration.studies.study_config import read_study
from orchestration.studies.study_folder import StudyFolder, held
from orchestration.tracking import contents

STUDENT = "method=ride_distill method.stages.train.teachers.teacher.run=sibling:"


def grid(tmp_path, *words):
    common = ["dataset=digits_lt", f"run.dir={tmp_path}", "study.name=x"]
    return lay_out(read_study([*common, *words]))


def taken(tmp_path, *words):
    asked = grid(tmp_path, *words)
    folder = StudyFolder(asked.folder)
    assert not list(folder.problems_with(asked))
    return folder, folder.take(asked)


def test_known_runs_keep_name_and_state_when_seeds_and_recipes_are_added(tmp_path):
    folder, points = taken(tmp_path, "method=ce", "seed=0")
    folder.update(points[0].run, status=FINISHED, attempts=2)
    folder.content["points"][0]["run"] = "named-long-ago"
    folder.write()
    folder, points = taken(tmp_path, "method=ce,ride", "seed=0,1")
    assert [point.run for point in points] == ["named-long-ago", "ce-s1", "ride-s0", "ride-s1"]
    kept = json.loads((tmp_path / "x" / "study.json").read_text())
    assert [record["status"] for record in kept["points"]] == [FINISHED, WAITING, WAITING, WAITING]
    assert kept["points"][0]["attempts"] == 2 and kept["seeds"] == [0, 1] and kept["schema"] == 1
    folder, points = taken(tmp_path, "method=ce", "seed=2")
    assert len(points) == 1 and len(folder.records) == 5, "those that are not asked for stay in the study"


def test_a_run_that_never_began_is_tried_when_what_it_needs_may_be_there(tmp_path):
    folder, points = taken(tmp_path, "method=ce", "seed=0")
    folder.update("ce-s0", status=FAILED, problem="it needs ride-s0, which has failed")
    assert folder.settle(points, retry=False) == []
    assert folder.record("ce-s0")["status"] == WAITING and folder.record("ce-s0")["problem"] is None


def test_a_run_whose_identity_a_newer_version_has_changed_is_there_once(tmp_path):
    folder, points = taken(tmp_path, "method=ce", "seed=0")
    folder.update("ce-s0", status=FINISHED, identity="of-an-older-version")
    folder, points = taken(tmp_path, "method=ce", "seed=0,1")
    assert [record["run"] for record in folder.records] == ["ce-s0", "ce-s1"]
    assert folder.record("ce-s0")["status"] == FINISHED and folder.record("ce-s0")["identity"] == points[0].identity


def test_a_run_that_others_need_keeps_the_name_by_which_they_need_it(tmp_path):
    def study(label, *more):
        recipes = [{"label": label, "words": "method=ride"}, *more]
        (tmp_path / "x.yaml").write_text(json.dumps({"recipes": recipes}))
        return f"study={tmp_path / 'x.yaml'}"

    def student(teacher):
        return {"label": "student", "words": f"{STUDENT}{teacher}"}

    taken(tmp_path, study("old"))
    assert list(StudyFolder(tmp_path / "x").problems_with(grid(tmp_path, study("new", student("new"))))) == [
        "student-s0: needs new-s0, which was trained as old-s0; needed the labels and axes that the study had then, or "
        "another study.name"
    ]
    assert [point.after for point in taken(tmp_path, study("old", student("old")))[1]] == [(), ("old-s0",)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ce", "seed=0", "method.stages.train.epochs=9"], "method.stages.train.epochs: .unset. -> 9"),
        (["method=ce", "seed=5", "dataset.imbalance_ratio=7"], "dataset.imbalance_ratio: .unset. -> 7"),
    ],
)
def test_another_study_in_the_folder_is_refused_with_its_differences(words, message, tmp_path):
    taken(tmp_path, "method=ce", "seed=0")
    asked = grid(tmp_path, *words)
    problems = "\n".join(StudyFolder(asked.folder).problems_with(asked))

    assert re.search(message, problems) and "another study.name" in problems


def test_failed_runs_stay_failed_until_they_are_asked_for(tmp_path):
    folder, points = taken(tmp_path, "method=ce", "seed=0,1")
    folder.update("ce-s0", status=FAILED, problem="the loss is not finite", attempts=1)
    folder.update("ce-s1", status="running")
    assert folder.settle(points, retry=False) == []
    assert [record["status"] for record in folder.records] == [FAILED, WAITING]
    assert "ce-s0: the loss is not finite" in status_text(tmp_path / "x")
    folder.settle(points, retry=True)
    assert [(record["status"], record["problem"]) for record in folder.records] == [(WAITING, None)] * 2


def test_runs_of_a_killed_start_that_are_not_asked_for_again_do_not_stay_running(tmp_path):
    folder, _ = taken(tmp_path, "method=ce", "seed=0,1,2,3")
    for run, status in {"ce-s1": "running", "ce-s2": "running", "ce-s3": FAILED}.items():
        folder.update(run, status=status)
    (tmp_path / "x" / "ce-s2").mkdir()
    (tmp_path / "x" / "ce-s2" / "run.json").write_text('{"status": "finished"}')
    folder, points = taken(tmp_path, "method=ce", "seed=0")
    folder.settle(points, retry=True)
    kept = json.loads((tmp_path / "x" / "study.json").read_text())["points"]
    assert [record["status"] for record in kept] == [WAITING, "stopped", FINISHED, FAILED]
    assert "ce-s1: its process was killed" in status_text(tmp_path / "x")


def test_a_study_is_held_by_one_process_at_a_time(tmp_path):
    refused = pytest.raises(ValueError, match="already being carried out by process")
    with held(tmp_path / "x"), refused, held(tmp_path / "x"):
        pass
    with held(tmp_path / "x"):
        pass


@pytest.mark.parametrize("more_s", [0, 60])
def test_a_start_waits_as_long_as_runs_of_a_killed_one_may_still_write(more_s, tmp_path, monkeypatch):
    clock, said = [0.0], []
    with open(tmp_path / ".lanes.lock", "a+") as left_over:
        fcntl.flock(left_over, fcntl.LOCK_EX)

        def sleep(_):
            clock[0] += 10.0
            if clock[0] >= PARENT_GONE_S + more_s:
                fcntl.flock(left_over, fcntl.LOCK_UN)

        monkeypatch.setattr(study_folder, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
        refused = pytest.raises(ValueError, match="processes of an earlier start still train after 930 s; wait")
        with refused if more_s else nullcontext(), held(tmp_path, said.append):
            assert clock[0] == PARENT_GONE_S
    assert len(said) == 1 and "waiting for them" in said[0]


def test_a_folder_of_studies_has_a_line_for_each_and_one_without_runs_is_refused(tmp_path):
    folder, _ = taken(tmp_path, "method=ce", "seed=0,1")
    folder.update("ce-s1", status=FINISHED)
    (tmp_path / "x" / "ce-s1").mkdir()
    assert status_text(tmp_path) == f"{tmp_path / 'x'}: a study of 2 runs; 1 waiting, 1 finished"


def test_a_study_keeps_no_password_and_its_runs_get_the_one_of_each_start(tmp_path):
    def store(secret):
        return f"tracking.uri=http://me:{secret}@host:5000"

    recipes = tmp_path / "x.yaml"
    recipes.write_text(f"recipes: [method=ce, method=ldam {store('0ther')}]\n")
    folder, points = taken(tmp_path, f"study={recipes}", store("s3cret"), "tracking.enabled=true")
    assert store("s3cret") in points[0].words and store("0ther") in points[1].words
    folder.update(points[0].run, status=FAILED, problem="no answer of http://me:s3cret@host:5000")
    assert "s3cret" not in status_text(folder.path) and "no answer of http://host:5000" in status_text(folder.path)
    _assert_without(folder.path, "s3cret", "0ther")
    assert not [point.run for point in points if "0ther" in point.run]

    folder, again = taken(tmp_path, f"study={recipes}", store("changed"), "tracking.enabled=true")
    assert [point.run for point in again] == [point.run for point in points] and store("changed") in again[0].words
    assert [record["status"] for record in folder.records] == [FAILED, WAITING]
    _assert_without(folder.path, "s3cret", "changed")


def test_a_password_that_an_earlier_version_kept_goes_nowhere_and_is_gone_at_the_next_start(tmp_path):
    store = "tracking.uri=http://me:s3cret@host:5000"
    folder, _ = taken(tmp_path, "method=ce")
    old = read_json(folder.path / "study.json")
    old["words"], old["points"][0]["words"] = [*old["words"], store], [*old["points"][0]["words"], store]
    write_json(folder.path / "study.json", old)
    sent = contents.files(folder.path)["study.json"]
    assert "s3cret" not in sent and json.loads(sent)["words"][-1] == "tracking.uri=http://host:5000"
    assert "s3cret" not in json.dumps(StudyFolder(folder.path).content)
    taken(tmp_path, "method=ce")
    _assert_without(folder.path, "s3cret")


def _assert_without(folder: Path, *secrets: str) -> None:
    """Look for secrets in a study's files and in what is sent of it."""
    texts = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    texts += [str(contents.files(folder)), str(contents.study_tags(folder)), *map(str, folder.rglob("*"))]
    assert texts and not [secret for secret in secrets if secret in " ".join(texts)]
