"""Every row of the published tables is a run of a committed study that meets its conditions, or is missing with why."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import yaml

from orchestration.config.compose import load_config
from orchestration.config.folders import choices, configs_folder
from orchestration.config.layers import read_yaml
from orchestration.reports.asked import asked_of
from orchestration.reports.published import published_for, published_tables
from orchestration.reports.write import write_report
from orchestration.studies.beside import beside_lines, finals_of, first_runs, rows_left, rows_meant
from orchestration.studies.grid import lay_out
from orchestration.studies.study_config import read_study
from tests.finished_runs import finish

STUDIES = sorted(choices("study"))
SURVEY = ("dataset=imagenet_lt", "protocol=survey", "backbone=resnext50", "tracking.enabled=false")
PRINTED = {
    "survey_table5": (23, 138, 8906.40),
    "survey_table6": (23, 138, 6217.70),
    "survey_table7": (16, 64, 2970.10),
    "h2t_slides_cifar100": (19, 51, 2432.99),
    "h2t_slides_imagenet": (19, 70, 3512.64),
    "h2t_slides_inat": (19, 61, 4338.78),
    "h2t_slides_places": (15, 60, 2308.49),
}
"""Rows, values and the sum of the values of each table, as they are printed."""
REFERENCE = os.environ.get("EXPERTAIL_PUBLISHED", "")
"""A file with one entry per published number, to compare every number with; it is not part of the project."""
COLUMNS = {"head": "many", "middle": "medium", "med": "medium", "tail": "few",
           "upper_reference_accuracy": "upper", "relative_accuracy": "relative"}  # fmt: skip


@functools.cache
def shown(name):
    """Lay out a study; return it, its tables, and what is published for each of its rows."""
    grid = lay_out(read_study([f"study={name}"]), files=False)
    tables = asked_of(grid.study.report, name).tables
    found = [
        (point, one)
        for point, config in (first_runs(grid) if tables else ())
        for stage in finals_of(config)
        if (one := published_for(config, stage, tables)) is not None
    ]
    return grid, tables, found


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_committed_study_composes_and_every_row_of_its_tables_is_there_or_missing(name):
    grid, tables, found = shown(name)
    missing = [one.label for one in grid.study.missing]
    assert all(one.why for one in grid.study.missing)
    if name == "h2t_ratio":  # of the table, it has the two recipes that it is about
        assert {one.row for _, one in found} == {"DR+H2T", "RIDE+H2T"}
        return
    assert rows_left(tables or (), found, missing) == []
    assert not {one.row for _, one in found} & set(missing), "a row with a run is not missing"
    printed = {label: sum(label in block.rows for block in published_tables()[table].blocks)
               for table in (tables or ())[:1] for label in published_tables()[table].rows}  # fmt: skip
    beside = [one.row for _, one in found]
    assert {label: beside.count(label) for label in printed if label not in missing} == {
        label: count for label, count in printed.items() if label not in missing
    }, "one run for every epochs, ratio or classifier that a row has a number for"


@pytest.mark.parametrize("name", list(published_tables()))
def test_a_table_has_every_number_that_is_printed(name):
    table = published_tables()[name]
    values = [value for block in table.blocks for row in block.rows.values() for value in row if value is not None]
    assert (len(table.rows), len(values)) == PRINTED[name][:2]
    assert sum(values) == pytest.approx(PRINTED[name][2], abs=0.005)
    assert all(len(row) == len(table.columns) for block in table.blocks for row in block.rows.values())
    assert {*table.recipes, *table.copied, *table.notes} <= {*table.rows}


@pytest.mark.skipif(not REFERENCE, reason="needs EXPERTAIL_PUBLISHED, a file with one entry per published number")
def test_every_number_is_that_of_the_reference():
    entries = yaml.safe_load(Path(REFERENCE).read_text())["entries"]
    theirs = {
        (e["table"], e["method"], e["epochs"], e["imbalance_ratio"], COLUMNS.get(e["split"], e["split"])): e["value"]
        for e in entries
        if e["table"] in published_tables()
    }
    ours = {}
    for name, table in published_tables().items():
        for block in table.blocks:
            key = block.conditions.get("stage.epochs"), block.conditions.get("dataset.imbalance_ratio")
            for label, row in block.rows.items():
                for column, value in zip(table.columns, row, strict=True):
                    if value is not None:
                        ours[(name, label, *key, column)] = value
    assert ours == theirs


@pytest.mark.parametrize(
    ("words", "row"),
    [
        ((), "Softmax"),
        (("method.stages.train.epochs=91",), None),
        (("backbone=resnet50",), None),
        (("method.stages.train.batch_size=128",), None),
        (("method.stages.train.optimizer.lr=0.2",), None),
        (("dataset.augment.name=randaugment",), None),
        (("dataset.augment.color_jitter=null",), None),
        (("method.stages.train.augment.name=randaugment",), None),
        (("dataset.max_per_class=100",), None),
        (("dataset.image_size=64",), None),
        (("run.max_steps=100",), None),
        (("dataset.balanced=true",), None),
        (("then=crt", "method.stages.train.epochs=200"), None),
    ],
    ids=[
        "base",
        "epochs",
        "backbone",
        "batch",
        "rate",
        "augmentation",
        "jitter",
        "a stage's",
        "images",
        "pixels",
        "cut",
        "balanced",
        "another recipe",
    ],
)
def test_a_number_stands_only_beside_a_run_that_meets_every_condition_of_its_table(words, row):
    found = published_for(load_config([*SURVEY, "method=ce", *words]), tables=("survey_table5", "survey_table6"))
    assert (found and found.row) == row
    if row:
        assert found.values == {"all": 45.5, "upper": 57.3, "relative": 79.4, "many": 66.5, "medium": 39.0, "few": 8.6}


def test_classes_are_grouped_as_in_the_table_and_by_count_where_its_authors_copied():
    words = ("dataset=imagenet_lt", "backbone=resnet50", "tracking.enabled=false")
    own = published_for(load_config([*words, "method=dr_h2t"]), tables=["h2t_slides_imagenet"])
    assert own.values == {"many_by_index": 63.26, "medium_by_index": 50.43, "few_by_index": 34.11, "all": 52.74}
    taken = published_for(load_config([*words, "method=ride", "mix=cmo"]), tables=["h2t_slides_imagenet"])
    assert taken.values == {"many": 66.4, "medium": 53.9, "few": 35.6, "all": 56.2}
    assert "taken over from its own paper" in taken.remarks


def test_a_report_shows_ours_beside_the_table_with_relative_accuracy(tmp_path):
    """All 1,000 classes at 50 %, and 80 % on balanced data: A_u 80, A_r 62.5, that is 22.7 above and 16.9 below."""
    ce, counts = (*SURVEY, "method=ce"), [1280] * 385 + [50] * 479 + [5] * 136
    finish(tmp_path / "ce-s0", accuracy=[0.5] * 1000, counts=counts, images=10, predictions=False, base=ce)
    finish(tmp_path / "even-s0", "dataset.balanced=true", accuracy=[0.8] * 1000, counts=[sum(counts) // 1000] * 1000,
           images=10, predictions=False, base=ce, digest="b0" * 32)  # fmt: skip
    points = [{"run": "ce-s0", "status": "finished"}, {"run": "even-s0", "status": "finished", "role": "reference"}]
    study = {"name": "table", "points": points, "report": {"tables": ["survey_table5", "survey_table6"]}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    folder = write_report([str(tmp_path)], print, pictures=False).folder
    text = (folder / "report.md").read_text()
    assert "| Softmax | 45.5 (+4.5) | 66.5 (-16.5) | 39.0 (+11.0) | 8.6 (+41.4) | 57.3 (+22.7) | 79.4 (-16.9) |" in text
    assert "Source: survey, Table 5" in text and "; survey, Table 6" in text
    row = json.loads((folder / "report.json").read_text())["tables"][0]["rows"][0]
    assert row["published"]["row"] == "Softmax"


def test_a_plan_says_what_will_stand_beside_what_is_missing_and_what_must_be_fetched():
    """No weights of ImageNet are here: a start is refused, a plan is made and says so."""
    with pytest.raises(ValueError, match="expertail import-weights"):
        lay_out(read_study(["study=h2t_places"]))
    lines = list(beside_lines(shown("h2t_places")[0]))
    table = [" ".join(line.split()) for line in lines]
    assert "RIDE+H2T (cosine classifier) RIDE+H2T_cosine_classifier 42.34 43.21 35.62 41.3" in table
    assert "missing   ABL: no public formula" in lines
    assert "remark    DR: 37.40 is printed, 38.12 follows from its groups" in lines
    assert sum(line.startswith("not there  method.backbone_weights: ") for line in lines) == 1
    assert not any(line.startswith("without") for line in lines), "every recipe has its row"


def test_a_plan_does_not_name_rows_of_recipes_that_the_study_is_not_about():
    grid, tables, _ = shown("h2t_ratio")
    assert not any("no run meets" in line for line in beside_lines(grid))
    assert rows_meant(["CE", "RIDE+H2T", "DR+H2T"], tables, first_runs(grid)) == ["RIDE+H2T", "DR+H2T"]


def test_the_result_of_a_recipe_is_that_of_its_row_where_both_are_from_one_table():
    """configs/published.yaml has the survey's 90 epochs and H2T's ratio 100, one result per recipe."""
    homes = {
        "survey, Table": (("survey_table5", "survey_table6"), {"stage.epochs": 90}),
        "H2T slides": (("h2t_slides_cifar100",), {"dataset.imbalance_ratio": 100.0}),
    }
    compared = 0
    for recipe, of_data in read_yaml(configs_folder() / "published.yaml")["results"].items():
        for result in of_data.values():
            home = next((home for source, home in homes.items() if result["remark"].startswith(source)), None)
            for name in home[0] if home else ():
                table = published_tables()[name]
                (block,) = [block for block in table.blocks if block.conditions == home[1]]
                (label,) = [label for label, row in table.recipes.items() if row.recipe == recipe]
                values = dict(zip(table.columns, block.rows[label], strict=True))
                shared = values.keys() & result["top1"].keys()
                compared += len(shared)
                assert {key: values[key] for key in shared} == {key: result["top1"][key] for key in shared}
    assert compared >= 15
