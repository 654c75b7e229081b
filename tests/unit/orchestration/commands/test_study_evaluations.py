"""A study measures what its report asks for: finished runs of the recipe, each once; a failure costs a line."""

from __future__ import annotations

import sys

import pytest

import orchestration.commands.study_evaluations as module
from experts.data.label_shift import published_distributions
from orchestration.results.label_shift import file_name
from orchestration.storage.files import write_json
from orchestration.studies.study_folder import StudyFolder

PUBLISHED = [one.name for one in published_distributions("digits_lt")]


def result(run, rule="test-time", model="last", names=(), skipped=(), split="test", **other):
    """Leave a result as `expertail evaluate` does."""
    content = {"rule": rule, "weights": model, "split": split, "dataset": "digits_lt"} | other
    content |= {"distributions": {name: {} for name in names}, "skipped": dict.fromkeys(skipped, "few images")}
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    write_json(run / "evaluation" / file_name(rule, model, split), content)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of two recipes. Returns what makes its report, and measurements as they are taken."""
    taken = []

    def evaluate(run, rule, model, distributions, split, overrides):
        if "bad" in run:
            raise ValueError("no experts")
        print("pass 1 of 5", file=sys.stderr)
        taken.append((run.rpartition("/")[2], rule, model, distributions, split, overrides))
        if "full" in run:
            return "uniform 86.9\n\nnot saved: disk full"
        names = [n for text in distributions.split(",") for n in (PUBLISHED if text == "published" else [text])]
        result(tmp_path / taken[-1][0], rule, model, names[1:], names[:1], split)
        return "uniform 86.9"

    def start(points, **report):
        points = [{"label": {"method": one["run"].partition("-")[0], "mix": "none"}, "status": "finished",
                   "role": "run"} | one for one in points]  # fmt: skip
        write_json(tmp_path / "study.json", {"points": points, "report": report})
        for one in points:
            (tmp_path / one["run"]).mkdir(exist_ok=True)
        said = []
        module.evaluate_asked(StudyFolder(tmp_path), said.append)
        measured = [one[0] for one in taken]
        taken.clear()
        return measured, said

    monkeypatch.setattr(module, "stages_to_measure", lambda run, stage: [""])
    monkeypatch.setattr(module, "evaluate", evaluate)
    return start


TADE = {"recipe": "method=tade"}
POINTS = [{"run": "tade-s0"}, {"run": "tade-s1"}]


def test_finished_runs_of_a_recipe_are_measured_once_and_others_left_alone(study, tmp_path):
    result(tmp_path / "tade-s1", names=PUBLISHED)
    points = [
        *POINTS,
        {"run": "tade-s2", "status": "failed"},
        {"run": "tade-balanced-s0", "role": "reference"},
        {"run": "ride-s0"},
        {"run": "tade-bad-s0"},
    ]
    measured, said = study(points, evaluate=[TADE])
    assert measured == ["tade-s0"]
    assert (tmp_path / "tade-s0" / "console.log").read_text() == "pass 1 of 5\nuniform 86.9\n"
    assert said == [
        "tade-s0: measured with test-time weights on test distributions published",
        "tade-bad-s0: not measured with test-time weights (ValueError: no experts)",
    ]
    assert study(POINTS, evaluate=[TADE]) == ([], [])


@pytest.mark.parametrize(
    "other",
    [
        {"model": "best"},
        {"split": "val"},
        {"names": ["forward-50"]},
        {"names": PUBLISHED[:-1]},
        {"rule": "known-prior"},
    ],
    ids=["model", "split", "distributions", "one less", "rule"],
)
def test_a_result_of_something_else_is_not_what_was_asked(study, tmp_path, other):
    result(tmp_path / "tade-s0", **({"names": PUBLISHED} | other))
    assert study(POINTS[:1], evaluate=[TADE])[0] == ["tade-s0"]


def test_a_damaged_result_is_measured_again(study, tmp_path):
    result(tmp_path / "tade-s0")
    (tmp_path / "tade-s0" / "evaluation" / "test-time-last-test.json").write_text("{")
    assert study(POINTS[:1], evaluate=[TADE])[0] == ["tade-s0"]


def test_the_model_is_that_of_the_report_and_distributions_of_several_entries_are_measured_together(study):
    """One file holds the results of a rule, so a second measurement would replace the first."""
    narrow = {"recipe": "mix=none", "distribution": "forward-50, backward-7"}
    measured, said = study(POINTS[:1], model="best", evaluate=[TADE, narrow])
    assert measured == ["tade-s0"]
    assert said == ["tade-s0: measured with test-time weights on test distributions published, forward-50, backward-7"]
    assert study(POINTS[:1], model="best", evaluate=[narrow, TADE]) == ([], [])
    assert study(POINTS[:1], model="last", evaluate=[TADE])[0] == ["tade-s0"]
    assert study(POINTS[:1], model="last", evaluate=[TADE, TADE | {"distribution": "forward-9"}])[0] == ["tade-s0"]


def test_a_result_that_was_not_saved_was_not_measured(study):
    measured, said = study([{"run": "tade-full-s0"}], evaluate=[TADE])
    assert measured == ["tade-full-s0"]
    assert said == ["tade-full-s0: not measured with test-time weights (OSError: not saved: disk full)"]
