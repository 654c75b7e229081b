"""study.json keeps names and states; another study in the folder is refused with what differs."""

from __future__ import annotations

import json
import re

import pytest

from orchestration.studies.grid import lay_out
from orchestration.studies.run_queue import FAILED, FINISHED, WAITING
from orchestration.studies.status import status_text
from orchestration.studies.study_config import read_study
from orchestration.studies.study_folder import StudyFolder, held


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
    folder.update("ce-s0", status=FAILED, problem="the loss is not finite")
    folder.update("ce-s1", status="running")
    assert folder.settle(points, retry=False) == []
    assert [record["status"] for record in folder.records] == [FAILED, WAITING]
    assert "ce-s0: the loss is not finite" in status_text(tmp_path / "x")
    folder.settle(points, retry=True)
    assert [(record["status"], record["problem"]) for record in folder.records] == [(WAITING, None)] * 2


def test_a_study_is_held_by_one_process_at_a_time(tmp_path):
    refused = pytest.raises(ValueError, match="already being carried out by process")
    with held(tmp_path / "x"), refused, held(tmp_path / "x"):
        pass
    with held(tmp_path / "x"):
        pass


def test_a_folder_of_studies_has_a_line_for_each_and_one_without_runs_is_refused(tmp_path):
    folder, _ = taken(tmp_path, "method=ce", "seed=0,1")
    folder.update("ce-s1", status=FINISHED)
    (tmp_path / "x" / "ce-s1").mkdir()
    assert status_text(tmp_path) == f"{tmp_path / 'x'}: a study of 2 runs; 1 waiting, 1 finished"
