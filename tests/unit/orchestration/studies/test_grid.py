"""Words and files become runs with names and labels; everything that is wrong is told at once, before a start."""

from __future__ import annotations

import pytest
import yaml

from orchestration.config.compose import load_config
from orchestration.config.identity import config_hash
from orchestration.studies.grid import lay_out
from orchestration.studies.study_config import read_study

STUDENT = "method=ride_distill method.stages.train.teachers.teacher.run=sibling"
DIGITS = ("dataset=digits_lt", "engine.threads=1")


def grid(*words, **file):
    if file:
        words = (f"study={file.pop('path')}", *words)
    return lay_out(read_study([*DIGITS, *words]))


def written(tmp_path, **content):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    return {"path": tmp_path / "mine.yaml"}


def test_every_combination_is_a_run_named_by_what_differs_seed_last(tmp_path):
    found = grid("method=ce,ride", "mix=none,cmo", "dataset.imbalance_ratio=50,100", "seed=0,7", f"run.dir={tmp_path}")
    assert len(found.points) == 16 and found.folder == tmp_path / "study-method+mix+ratio-digits_lt"
    assert [point.run for point in found.points[:4]] == [
        "ce-ratio50-s0",
        "ce-ratio50-s7",
        "ce-ratio100-s0",
        "ce-ratio100-s7",
    ]
    last = found.points[-1]
    assert last.run == "ride+cmo-ratio100-s7" and last.seed == 7 and last.role == "run"
    assert last.label == {"method": "ride", "mix": "cmo", "dataset.imbalance_ratio": "100"}
    assert found.points[0].label["mix"] == "none"
    assert config_hash(load_config(list(last.words))) == last.identity, "a single run of its words is this run"
    assert "cluster.cpus_per_worker=1" in last.words


def test_names_stay_when_values_and_seeds_are_added():
    few = {point.identity: point.run for point in grid("method=ce", "seed=0").points}
    many = {point.identity: point.run for point in grid("method=ce,ride", "seed=0,1").points}
    assert few.items() <= many.items()
    assert grid("method=ce,ride", "seed=0").name == grid("method=ce,ride,tade", "seed=0,1").name


def test_a_file_has_recipes_exclusions_a_baseline_and_missing_rows_and_words_replace_its_axes(tmp_path):
    path = written(
        tmp_path,
        recipes=["method=ce", {"label": "RIDE, 5", "words": "method=ride method.num_experts=5"}, "method=ride mix=cmo"],
        axes={"dataset.imbalance_ratio": [50, 100]},
        seeds=[0, 1],
        exclude=[{"mix": "cmo", "dataset.imbalance_ratio": 100}],
        baseline="method=ce",
        missing=[{"label": "ABL", "why": "no public formula"}],
    )
    found = grid("study.parallel=3", **path)
    assert found.name == "mine" and found.study.parallel == 3 and len(found.points) == 10
    assert found.baseline == {"method": "ce"} and found.study.missing[0].label == "ABL"
    five = next(point for point in found.points if "RIDE" in point.run)
    assert five.run == "RIDE_5-ratio50-s0" and five.label["recipe"] == "RIDE, 5"
    fewer = grid("dataset.imbalance_ratio=20", "seed=4", **path)
    assert [point.run for point in fewer.points] == ["ce-s4", "RIDE_5-s4", "ride+cmo-s4"]


def test_references_are_balanced_runs_that_recipes_share():
    found = grid("method=ce,ride", "seed=0,1", "study.references=true").points
    references = {point.run for point in found if point.role == "reference"}
    assert references == {f"{name}-balanced-s{seed}" for name in ("ce", "ride") for seed in (0, 1)}
    alone = [point for point in grid("method=ride", "seed=0", "study.references=true").points if point.role != "run"]
    assert [point.run for point in alone] == ["ride-balanced-s0", "ce-balanced-s0"]
    assert alone[1].label == {"method": "ce", "dataset.balanced": "true"} or "method" not in alone[1].label


def test_a_run_learns_from_the_run_of_another_recipe_with_its_own_values_and_seed(tmp_path):
    teacher = "method.stages.train.teachers.teacher.run"
    path = written(
        tmp_path,
        recipes=[
            {"label": "student", "words": f"method=ride_distill {teacher}=sibling:RIDE_6"},
            {"label": "RIDE, 6", "words": "method=ride method.num_experts=6"},
        ],
        axes={"dataset.imbalance_ratio": [20, 50]},
        seeds=[0, 1],
        references=True,
    )
    found = grid(f"run.dir={tmp_path}", **path)
    points = {point.run: point for point in found.points}
    needs = {run: point.after for run, point in points.items() if run.startswith("student")}
    assert needs == {
        f"student{kind}-ratio{ratio}-s{seed}": (f"RIDE_6{kind}-ratio{ratio}-s{seed}",)
        for kind in ("", "-balanced") for ratio in (20, 50) for seed in (0, 1)
    }  # fmt: skip
    assert {needed for after in needs.values() for needed in after} <= points.keys()

    # A single run of its words is this run, wherever the study lies: the teacher lies beside it.
    words = list(points["student-ratio50-s1"].words)
    single = load_config([*words, f"run.dir={tmp_path / 'elsewhere'}"])
    source = single.method.stages["train"].teachers["teacher"]
    assert source.folder(single.run.dir) == tmp_path / "elsewhere" / "RIDE_6-ratio50-s1"
    assert config_hash(single) == points["student-ratio50-s1"].identity


@pytest.mark.parametrize(
    ("axes", "exclude", "student", "needed"),
    [
        ({"mix": ["none", "cmo"]}, [], "S-mixcmo-s0", "T-mixcmo-s0"),
        ({"mix": ["none", "cmo"]}, [], "S-mixnone-s0", "T-mixnone-s0"),
        ({"dataset.imbalance_ratio": [20]}, [], "S-ratio20-s0", "T-ratio20-s0"),
    ],
)
def test_a_sibling_has_the_values_of_every_axis(axes, exclude, student, needed, tmp_path):
    recipes = [{"label": "T", "words": "method=ride"}, {"label": "S", "words": f"{STUDENT}:T"}]
    found = grid(**written(tmp_path, recipes=recipes, axes=axes, exclude=exclude)).points
    assert {point.run: point.after for point in found}[student] == (needed,)


@pytest.mark.parametrize(
    ("recipes", "more", "problem"),
    [
        ([{"label": "T", "words": "method=ride"}, {"label": "S", "words": f"{STUDENT}:T"}],
         {"axes": {"mix": ["none", "cmo"]}, "exclude": [{"recipe": "T", "mix": "cmo"}]},
         "S: sibling:T: excluded at mix=cmo; needed both there, or none"),
        ([*(f"method=ride method.num_experts={n}" for n in (2, 4)), {"label": "S", "words": f"{STUDENT}:ride"}],
         {}, "S: sibling:ride: 2 recipes are called so; needed a label for one of them"),
        (["method=ce", {"label": "S", "words": f"{STUDENT}:ce method.stages.train.teachers.teacher.final=crt"}],
         {}, "S: method.stages.train: sibling:ce: it has no final stage crt; needed one of its own: train"),
        (["method=ldam", {"label": "S", "words": "method=ce method.stages.train.start_from.run=sibling:ldam"}],
         {}, "S: method.stages.train: sibling:ldam: .*head"),
    ],
)  # fmt: skip
def test_a_sibling_that_cannot_be_meant_is_refused_before_its_teacher_trains(recipes, more, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        grid(**written(tmp_path, recipes=recipes, **more))


def test_a_reference_learns_from_the_run_that_its_teachers_reference_is(tmp_path):
    """Plain cross-entropy's reference is there once, under the name of the recipe that came first."""
    recipes = ["method=ride", {"label": "plain", "words": "method=ce"}, {"label": "S", "words": f"{STUDENT}:plain"}]
    points = {point.run: point for point in grid(**written(tmp_path, recipes=recipes, references=True)).points}
    (needed,) = points["S-balanced-s0"].after
    assert points[needed].role == "reference" and "method=ce" in points[needed].words
    assert any(f"sibling:{needed}" in word for word in points["S-balanced-s0"].words)
    assert config_hash(load_config(list(points["S-balanced-s0"].words))) == points["S-balanced-s0"].identity


def test_a_file_may_change_another_and_name_the_words_of_its_references(tmp_path):
    words = ["dataset=digits_lt", "engine.threads=1"]
    base = {"words": words, "recipes": [{"label": "Softmax, plain", "words": "method=ce"}], "references": True}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base | {"axes": {"dataset.imbalance_ratio": [20, 50]}}))
    changed = {"of": str(tmp_path / "base.yaml"), "references": ["dataset.balanced=true", "dataset.max_per_class=100"]}
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    found = lay_out(read_study([f"study={tmp_path / 'changed.yaml'}"]))
    assert found.name == "base" and [point.run for point in found.points if point.role == "run"] == [
        "Softmax_plain-ratio20-s0",
        "Softmax_plain-ratio50-s0",
    ]
    reference = next(point for point in found.points if point.role == "reference")
    assert reference.run == "Softmax_plain-balanced-ratio20-s0" and "dataset.max_per_class=100" in reference.words


def test_what_a_study_asks_of_its_reports_is_checked_before_a_start(tmp_path):
    path = written(tmp_path, recipes=["method=ce"], report={"modle": "best", "tables": ["survey_table9"]})
    with pytest.raises(ValueError, match="2 problems") as refused:
        grid(**path)
    assert "report.modle: unknown key; known: model, tables, evaluate" in str(refused.value)
    assert "report.tables: no table survey_table9; known: survey_table5, " in str(refused.value)
    measured = {"evaluate": [{"recipe": "method=tade"}]}
    path = written(tmp_path, recipes=["method=ce", "method=ride"], report=measured)
    with pytest.raises(ValueError, match=r"report.evaluate.0.recipe = method=tade: no run has it"):
        grid(**path)
