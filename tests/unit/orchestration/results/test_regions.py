"""Decision regions of runs whose last stage trains heads alone, from run folders made in this process."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from orchestration.cli import main
from orchestration.results.pictures import draw_report
from orchestration.results.regions import _starting_model, draw_regions_if_heads_alone
from orchestration.results.saved_run import open_run
from orchestration.storage.checkpoint import read_tensors
from tests.short_runs import train

pytestmark = pytest.mark.slow  # pictures take seconds


@pytest.fixture(scope="module")
def ride(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "ride", "ride_h2t")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "single", "dr_h2t")


@pytest.mark.parametrize("host", ["ride", "single"])
def test_a_report_has_the_regions_of_every_member_before_and_after(host, request):
    run = request.getfixturevalue(host)
    written = draw_report(run)
    assert run / "report" / "regions.png" in written
    with Image.open(run / "report" / "regions.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.std() > 10 and 300 < min(pixels.shape) < 2000
    found = json.loads((run / "evaluation" / "regions.json").read_text())
    assert (found["before"], found["after"]) == ("stage train", "stage h2t")
    assert (found["classes"], found["train_images"]) == (["0", "9"], [120, 6])
    names = [one["member"] for one in found["members"]]
    assert (
        names
        == {
            "ride": ["ensemble", "expert0", "expert1", "expert2"],
            "single": ["ensemble"],
        }[host]
    )
    for one in found["members"]:
        assert 0 < one["plane_variance"] <= 1
        for moment in ("before", "after"):
            assert sum(one["moments"][moment]["area"]) == pytest.approx(1.0)
            assert all(0 <= share <= 1 for share in one["moments"][moment]["recall"])
    if host == "ride":
        assert any(one["moments"]["before"] != one["moments"]["after"] for one in found["members"])


def test_before_are_the_weights_that_the_last_stage_began_with(ride):
    """They are those of stage train's checkpoint; heads and BatchNorm's statistics alone have moved since."""
    saved = open_run(str(ride), "last", "test", [])
    before, after = _starting_model(saved).ensemble.state_dict(), saved.model.ensemble.state_dict()
    trained = {}
    for name in ("trunk", "expert0", "expert1", "expert2"):
        trained |= read_tensors(ride / "checkpoints" / "00-train-00000002", name)
    assert all((before[name] == trained[name]).all() for name in before) and before.keys() == trained.keys()
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert {name for name in moved if "head" in name} == {f"experts.expert{k}.head.weight" for k in range(3)}
    assert all("running" in name or "num_batches" in name or "head" in name for name in moved)


def test_a_picture_is_the_same_when_drawn_again(single):
    (picture,) = draw_regions_if_heads_alone(single)
    before = picture.read_bytes()
    assert draw_regions_if_heads_alone(single) == [picture]
    assert picture.read_bytes() == before


def test_classes_may_be_chosen(single, capsys):
    assert main(["regions", str(single), "--classes", "7, 1,3"]) == 0
    printed = capsys.readouterr().out
    assert "7: area" in printed and "3: right" in printed and "regions-7-1-3.png" in printed
    assert json.loads((single / "evaluation" / "regions-7-1-3.json").read_text())["class_ids"] == [7, 1, 3]
    assert (single / "report" / "regions-7-1-3.png").exists()


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("0,12", "no class '12'; needed ids from 0 to 9"),
        ("0,cat", "no class 'cat'"),
        ('0,"cat, high"', "no class 'cat, high'"),
        ("0,\u00b2", "no class '\u00b2'"),  # a digit that is no number
        ("4", "two or more different classes"),
        ("4,4", "two or more different classes"),
    ],
)
def test_classes_that_cannot_be_shown_are_refused(single, classes, words, capsys):
    assert main(["regions", str(single), "--classes", classes]) == 1
    assert words in capsys.readouterr().err


def test_a_run_without_such_a_stage_is_refused_by_the_command_and_passed_over_by_the_report(tmp_path, capsys):
    run = train(tmp_path / "run", "ce", stages=1)
    assert main(["regions", str(run)]) == 1
    assert "its last stage, train, trains features, heads, trunk; needed" in capsys.readouterr().err
    assert run / "report" / "regions.png" not in draw_report(run)
    assert capsys.readouterr().err == ""


def test_a_run_whose_last_stage_has_not_begun_is_refused(tmp_path, capsys):
    run = train(tmp_path / "run", "dr_h2t", stages=1)
    assert main(["regions", str(run)]) == 1
    assert "stage h2t has not begun (reached: train)" in capsys.readouterr().err
    assert run / "report" / "regions.png" not in draw_report(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["regions", str(tmp_path / "nothing")]) == 1
    assert "nothing there" in capsys.readouterr().err


def test_regions_that_cannot_be_drawn_cost_a_line_and_not_the_report(single, tmp_path, capsys):
    run = shutil.copytree(single, tmp_path / "run", ignore=shutil.ignore_patterns("regions*"))
    shutil.rmtree(run / "checkpoints" / "00-train-00000002")
    written = draw_report(run)
    assert "decision regions are not drawn: " in (said := capsys.readouterr().err) and "no checkpoint" in said
    assert run / "report" / "class_counts.png" in written and run / "report" / "regions.png" not in written
