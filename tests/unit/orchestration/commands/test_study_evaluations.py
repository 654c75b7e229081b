"""A study measures what its report asks for: finished runs of the recipe, each once; a failure costs a line."""

from __future__ import annotations

import sys

import orchestration.commands.study_evaluations as module
from orchestration.storage.files import write_json
from orchestration.studies.study_folder import StudyFolder


def test_finished_runs_of_a_recipe_are_measured_once_and_others_left_alone(tmp_path, monkeypatch):
    def point(run, method, **other):
        return {"run": run, "label": {"method": method, "mix": "none"}, "status": "finished", "role": "run"} | other

    points = [
        point("tade-s0", "tade"),
        point("tade-s1", "tade"),
        point("tade-s2", "tade", status="failed"),
        point("tade-balanced-s0", "tade", role="reference"),
        point("ride-s0", "ride"),
        point("bad-s0", "tade"),
    ]
    (tmp_path / "tade-s1" / "evaluation").mkdir(parents=True)
    write_json(tmp_path / "tade-s1" / "evaluation" / "test-time.json", {})
    write_json(tmp_path / "study.json", {"points": points, "report": {"evaluate": [{"recipe": "method=tade"}]}})
    asked, said = [], []

    def evaluate(run, *how):
        if "bad" in run:
            raise ValueError("no experts")
        print("pass 1 of 5", file=sys.stderr)
        asked.append((run, *how))
        return "uniform 86.9"

    for name in ("tade-s0", "bad-s0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(module, "evaluate", evaluate)
    module.evaluate_asked(StudyFolder(tmp_path), said.append)
    assert asked == [(str(tmp_path / "tade-s0"), "test-time", None, "published", "test", [])]
    assert (tmp_path / "tade-s0" / "console.log").read_text() == "pass 1 of 5\nuniform 86.9\n"
    assert said == [
        "tade-s0: measured with test-time weights on test distributions published",
        "bad-s0: not measured with test-time weights (ValueError: no experts)",
    ]
