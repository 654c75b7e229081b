"""A sweep is a study of plain words: any keys, seeds as repeats, one folder for each thing that is asked."""

from __future__ import annotations

import json

import pytest

from orchestration.cli import main
from orchestration.commands.sweep import refuse_one_run
from orchestration.studies.grid import lay_out
from orchestration.studies.study_config import read_study
from orchestration.studies.study_folder import StudyFolder, with_a_folder

RATIO = "method.stages.h2t.flow.ratio"


def planned(tmp_path, *words):
    said = []
    study = read_study(["dataset=digits_lt", f"run.dir={tmp_path}", *words])
    grid = with_a_folder(lay_out(study, files=False), said.append)
    return grid, said


@pytest.mark.parametrize(
    ("words", "name", "runs"),
    [
        ([f"{RATIO}=0,0.5", "method=ride_h2t"], "study-ratio-ride_h2t-digits_lt",
         ["ride_h2t-ratio0-s0", "ride_h2t-ratio0.5-s0"]),
        (["method=ce,ldam", "then=[joint,ncm]"], "study-method-joint+ncm-digits_lt",
         ["ce+joint+ncm-s0", "ldam+joint+ncm-s0"]),
        (["then=crt,[ncm,lws]", "method=ce", "mix=mixup"], "study-then-ce+mixup-digits_lt",
         ["ce+mixup+crt-s0", "ce+mixup+ncm+lws-s0"]),
        (["mix=null,cmo", "method=mislas"], "study-mix-mislas-digits_lt", ["mislas+unmixed-s0", "mislas+cmo-s0"]),
        (["dataset=digits_lt,cifar10_lt", "method=ce"], "study-dataset-ce", ["ce-digits_lt-s0", "ce-cifar10_lt-s0"]),
        (["seed=0,2", "method=ce"], "study-ce-digits_lt", ["ce-s0", "ce-s2"]),
        (["pace=demo,generic", "method=ce"], "study-pace-ce-digits_lt", ["ce-demo-s0", "ce-generic-s0"]),
        (["method=ce,ldam", "dataset.imbalance_ratio=20,50", "study.name=x"], "x",
         ["ce-ratio20-s0", "ce-ratio50-s0", "ldam-ratio20-s0", "ldam-ratio50-s0"]),
    ],
)  # fmt: skip
def test_any_keys_vary_and_runs_are_named_by_them_seed_last(words, name, runs, tmp_path):
    refuse_one_run(words)
    grid, said = planned(tmp_path, *words)
    assert (grid.name, [point.run for point in grid.points], said) == (name, runs, [])


def test_a_second_sweep_that_would_be_called_alike_has_a_folder_of_its_own(tmp_path):
    """The two ratios of a recipe have one short name, and so has a sweep with another schedule."""
    words = ["method=ride_h2t", f"{RATIO}=0,0.5"]
    first, _ = planned(tmp_path, *words)
    StudyFolder(first.folder).take(first)
    again, said = planned(tmp_path, *words, f"{RATIO}=0,0.25,0.5", "seed=0,1")
    assert (again.folder, said) == (first.folder, []), "a value and a seed more are the same sweep"

    for other in (["method=ride_h2t", "dataset.imbalance_ratio=20,50"], [*words, "method.stages.train.epochs=9"]):
        second, said = planned(tmp_path, *other)
        assert second.name.startswith(f"{first.name}-") and second.folder == tmp_path / second.name
        assert f"tracking.experiment={second.name}" in second.defaults
        assert len(said) == 1 and "holds another study" in said[0] and second.name in said[0]
        StudyFolder(second.folder).take(second)
        assert planned(tmp_path, *other) == (second, []), "the same command goes on with it"
    assert len({path.parent for path in tmp_path.glob("*/study.json")}) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ce"], "one value for every key; needed a key with several, e.g. method=ce,ldam"),
        (["study=tour"], "a sweep has no file; needed `expertail study study=tour`"),
        (["nothing"], "not of the form key=value"),
    ],
)
def test_words_that_are_no_sweep_are_refused_before_anything_starts(words, message, tmp_path, capsys):
    assert main(["sweep", *words, f"run.dir={tmp_path}"]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_sweep_can_be_planned(tmp_path, capsys):
    words = ["method=ce,ldam", "seed=0,1", "dataset=digits_lt", f"run.dir={tmp_path}", "tracking.enabled=false"]
    assert main(["sweep", *words, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "study study-method-digits_lt" in said and "4 runs: 0 finished, 4 to train" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["report", "status", "sync"])
def test_a_sweep_of_an_earlier_version_is_told_of_with_what_to_do(command, tmp_path, capsys):
    (tmp_path / "x-sweep").mkdir()
    (tmp_path / "x-sweep" / "sweep.json").write_text(json.dumps({"runs": [{"run": "x-0"}, {"run": "x-0.5"}]}))
    assert main([command, str(tmp_path / "x-sweep")]) == 1
    said = capsys.readouterr().err
    assert "found a sweep of an earlier version" in said
    assert f"expertail report {tmp_path / 'x-0'} {tmp_path / 'x-0.5'}" in said
