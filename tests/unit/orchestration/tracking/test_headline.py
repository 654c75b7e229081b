"""Headline metrics of runs and rows, by hand."""

from __future__ import annotations

import json

import pytest

from orchestration.storage.files import write_json
from orchestration.tracking.headline import experiment_tags, grouped_by_index, headline, in_words, mean_and_spread

INDEX = {"by_count": {"few": []}, "by_index": {"few": [7]}}  # as data.json has groups


def write_run(folder, top1, **run):
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    for which, add in (("last", 0.0), ("best", 0.125)):
        shown = {group: None if value is None else value + add for group, value in top1.items()}
        write_json(folder / "evaluation" / f"{which}.json", {"members": {"ensemble": {"top1": shown}}})
    write_json(folder / "run.json", {"status": "finished", **run})


def test_a_finished_run_has_percentages_and_what_it_costs(tmp_path):
    cost, size = {"cpu_hours": 2.5, "gpu_hours": 0.0}, {"parameters": 460_000, "multiply_adds": 69_000_000}
    write_run(tmp_path, {"all": 0.582, "many": 0.75, "medium": 0.5, "few": 0.25}, cost=cost, size=size)
    assert headline(tmp_path) == {
        "final/all": 58.2, "final/many": 75.0, "final/medium": 50.0, "final/few": 25.0, "best/few": 37.5,
        "cost/cpu_hours": 2.5, "cost/parameters": 460_000.0, "cost/gmacs": 0.069,
    }  # fmt: skip
    write_run(tmp_path, {"all": 0.5}, cost={"cpu_hours": 2.5, "gpu_hours": 1.25})
    assert headline(tmp_path) == {"final/all": 50.0, "cost/gpu_hours": 1.25}
    write_run(tmp_path, {"all": 0.5}, status="stopped")
    assert headline(tmp_path) == {}


def test_without_few_shot_classes_by_count_groups_are_those_by_index(tmp_path):
    top1 = {"all": 0.5, "many": 0.5, "medium": None, "few": None, "many_by_index": 0.75, "few_by_index": 0.25}
    write_run(tmp_path, top1)
    found = headline(tmp_path)
    assert found == {
        "final/all": 50.0, "final/many_by_index": 75.0, "final/few_by_index": 25.0, "best/few_by_index": 37.5
    }  # fmt: skip


def test_a_row_has_means_and_spreads_of_the_runs_that_have_a_number():
    found = mean_and_spread([
        {"final/few": 10.0, "final/all": 60.0, "cost/parameters": 460_123.0},
        {"final/few": 13.0, "cost/parameters": 460_123.0},
    ])  # fmt: skip
    assert found == {"final/few": 11.5, "final/all": 60.0, "cost/parameters": 460_123.0, "sd/final/few": 2.12}
    assert mean_and_spread([]) == {}


def test_saved_views_have_the_headline_metrics_and_fit_into_a_tag():
    tags = experiment_tags(of_study=True)
    views = {key: json.loads(value) for key, value in tags.items() if key.startswith("mlflow.sharedViewState.")}
    assert len(views) == 2 and len(max(tags.values(), key=len)) < 5000
    for view in views.values():
        state = json.loads(view["state"])
        assert state["orderByKey"] in state["selectedColumns"]
    assert len(experiment_tags(of_study=False)) == len(tags) - 1


def test_a_model_is_described_by_few_and_all_first():
    top1 = {"all": 0.582, "many": 0.75, "medium": 0.5, "few": 0.25}
    said = in_words({"split": "val", "epoch": 3, "members": {"ensemble": {"top1": top1}}})
    assert said == "few 25.0, all 58.2, medium 50.0, many 75.0: top-1 in % of val, epoch 3"
    assert in_words({"members": {"ensemble": {"top1": {"all": 0.5}}}}).startswith("all 50.0: top-1")
    assert in_words({}) == ""


@pytest.mark.parametrize(
    ("data", "by_index"),
    [
        ([INDEX], True),
        ([{"by_count": {"few": []}, "by_index": None}], False),
        ([INDEX, {"by_count": {"few": [7]}, "by_index": {"few": [7]}}], False),
        ([None, INDEX], True),
        ([None], None),
    ],
)  # fmt: skip
def test_groups_are_those_by_index_where_no_run_has_few_shot_classes_by_count(data, by_index, tmp_path):
    runs = [tmp_path / str(number) for number in range(len(data))]
    for run, groups in zip(runs, data, strict=True):
        run.mkdir()
        if groups is not None:
            write_json(run / "data.json", {"groups": groups})
    assert grouped_by_index(runs) is by_index


def test_saved_views_of_sets_by_index_have_the_metrics_that_their_runs_have(tmp_path):
    top1 = {"all": 0.5, "many": 0.5, "medium": None, "few": None}
    top1 |= {"many_by_index": 0.75, "medium_by_index": 0.5, "few_by_index": 0.25}
    write_run(tmp_path, top1)
    there = mean_and_spread([headline(tmp_path)] * 2)
    tags = experiment_tags(of_study=True, by_index=True)
    assert tags["mlflow.experiment.primaryMetric.name"] in there and len(max(tags.values(), key=len)) < 5000
    for view in (json.loads(value) for key, value in tags.items() if key.startswith("mlflow.sharedViewState.")):
        state = json.loads(view["state"])
        assert state["orderByKey"] == "metrics.`final/few_by_index`"
        columns = [name.split("`")[1] for name in state["selectedColumns"] if name.startswith("metrics.")]
        assert len(columns) >= 5 and set(columns) <= there.keys()
