"""The tables of the documents are filled from committed studies, which have every recipe."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables
from benchmarks.tables import REAL, ROOT, filled_in, in_code, kept, read, table
from orchestration.config.compose import load_config
from orchestration.config.folders import choices
from orchestration.studies.grid import label_of
from orchestration.studies.study_config import read_study

EVERY_RECIPE = ("fashion_mnist_lt", "cifar10_lt")
HERE = ("dataset.num_classes=10",)  # what a folder would tell


def host(recipe):
    """Return what the rows of a recipe's final stages are called after: ce, ce+mixup, gcl."""
    label = label_of(recipe.words.split())
    return recipe.label or "+".join(label[key] for key in ("method", "mix") if key in label)


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_every_recipe_is_in_the_study_by_name_or_as_a_stage_of_a_run_or_missing_with_a_reason(name):
    study = read_study([f"study={name}"])
    trained = {label_of(recipe.words.split())["method"] for recipe in study.recipes}
    missing = {one.label for one in study.missing}
    stages = {row: recipe for row, recipe in tables.NAMES.items() if recipe in set(choices("method")) - trained}
    assert trained | missing | set(stages.values()) == set(choices("method")) and not trained & missing
    assert study.seeds == (0, 1, 2) and study.baseline == "method=ce"

    several = [(host(recipe), load_config([*study.words, *recipe.words.split(), *HERE]).method)
               for recipe in study.recipes if "then=[" in recipe.words]  # fmt: skip
    for row, recipe in stages.items():
        whole = load_config([*study.words, f"method={recipe}", *HERE]).method
        own = next(m for its, m in several if its == row.rpartition("+")[0] and whole.final in m.stages)
        assert own.head == whole.head
        for stage, content in whole.stages.items():
            if (name, stage) != ("cifar10_lt", "mislas"):  # which has words that were published for CIFAR-10
                beside = {key: getattr(own.stages[stage], key) for key in ("after", "start_from")}
                assert content.model_copy(update=beside) == own.stages[stage], (recipe, stage)


def test_cifar_as_files_has_the_mixing_and_the_keys_that_were_published_for_it():
    """The folder of images is no data set with a name, so blocks for CIFAR in configs do not reach it."""
    study = read_study(["study=cifar10_lt"])
    for word in (recipe.words for recipe in study.recipes):
        label = label_of(word.split())
        if "mix" in label or label["method"] == "deconfound":
            ours = load_config([*study.words, *word.split(), *HERE]).method
            named = [f"{key}={label[key]}" for key in ("method", "mix") if key in label]
            theirs = load_config([*named, "dataset=cifar10_lt", "pace=fashion_mnist_lt"]).method
            assert ours.stages["train"].mixing == theirs.stages["train"].mixing, word
            assert ours.head == theirs.head or "gcl" in word


def measure(mean, sd=0.01):
    return {"mean": mean, "sd": sd, "by_seed": {"0": mean}}


def row(label, mean, words=None, **more):
    run = {"run": f"{label}-s0", "commit": "c0ffee1234", "stage": "train", "seed": 0}
    differences = {} if words is None else {group: {"mean": 0.125, "words": words} for group in tables.GROUPS}
    cost = {"parameters": 7, "inference": 9.4e6, "training": 1.36e12, "teachers": False, "worker_hours": 1}
    return {"label": label, "seeds": [0], "runs": [run], "cost": cost, "differences": differences,
            "measures": dict.fromkeys(tables.GROUPS, measure(mean)), **more}  # fmt: skip


def report():
    data = {"name": "d", "digest": "1", "classes": 10, "images": 9, "group_sizes": {}}
    first = {"data": data, "schedule": {"epochs": 15}, "seeds": [0, 1], "baseline": "ce+joint", "rows": [
        row("ce+joint", 0.5), row("ride, 6 experts", 0.625, REAL, seeds=[0, 1]),
        row("ce+mixup+mislas", 0.4, "not told apart by 2 seeds"),
    ]}  # fmt: skip
    other = {"data": data | {"digest": "2"}, "schedule": {"epochs": 15}, "seeds": [0], "baseline": None,
             "rows": [row("lfme", None)]}  # fmt: skip
    third = other | {"baseline": "gcl+joint", "rows": [row("gcl+gcl", 0.5, REAL)]}
    return {"title": "s", "tables": [other, first, third], "made_with": {}, "missing": [{"label": "x", "why": "y"}]}


def test_a_table_shows_bold_what_is_real_the_seeds_that_are_there_and_what_is_not():
    points = [{"run": run} for run in ("ce+joint-s0", "ce+joint-s1", "tade-s0", "tade-s1")]
    record = kept(report(), {"points": points}, {"runs": {}, "makers": {}})
    assert record == json.loads(tables.as_text(record))
    lines = list(table(record, tables.NAMES))
    assert lines[2] == "| `ce` (1 of 2 seeds) | 50.0 ± 1.0 | 50.0 ± 1.0 | 50.0 ± 1.0 | 50.0 ± 1.0 | 50.0 / 50.0 / 50.0 |  | 9.4 | 1.36 |"  # fmt: skip  # noqa: E501
    assert lines[3].startswith("| `ride`, 6 experts | 62.5 ± 1.0 |") and "| **+12.5** / **+12.5** |" in lines[3]
    assert lines[4].startswith("| `mislas` (1 of 2 seeds) |") and "| +12.5 / +12.5 |" in lines[4]
    # The third table has a baseline of its own, and its differences are not to `ce`.
    assert lines[5].startswith("| `gcl` (1 of 2 seeds) | 50.0 ± 1.0 |") and "| 50.0 / 50.0 / 50.0 |  |" in lines[5]
    assert lines[6].startswith("| `lfme` (1 of 2 seeds) | n/a |")
    assert lines[7:] == [
        "", "Not compared with `ce`: `gcl`, `lfme` (other images are held out).", "Not trained yet: `tade`.",
        "Not in the study: `x`, since y.",
    ]  # fmt: skip


def test_labels_are_names_as_code_and_words():
    shown = [in_code(label) for label in ("ce+mixup", "ce with DRW", "class_balanced, form focal")]
    assert shown == ["`ce` + `mixup`", "`ce` with DRW", "`class_balanced`, form focal"]


def test_tables_go_between_their_marks_and_nowhere_else():
    text = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\nold\n<!-- end -->\nc\n"
    once = tables.between_marks(text, {"y": ["| new |"]}, "d.md")
    assert once == text[: text.rindex("old")] + "\n| new |\n\n<!-- end -->\nc\n"
    assert tables.between_marks(once, {"y": ["| new |"]}, "d.md") == once
    with pytest.raises(ValueError, match="table: z"):
        tables.between_marks(text, {"z": []}, "d.md")


@pytest.mark.parametrize("path", ["docs/results.md", "README.md"])
def test_the_documents_show_what_was_measured(path):
    text = (ROOT / path).read_text()
    assert all(read(name) for name in tables.STUDIES)
    assert filled_in(text, path.rpartition("/")[2]) == text
