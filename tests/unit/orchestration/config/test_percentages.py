"""Percentages of a stage become whole epochs once its length is known."""

from __future__ import annotations

import pytest

from orchestration.config.origins import Layered
from orchestration.config.percentages import resolve_percentages

DROPS = "lr_schedule.milestones"


def resolved(epochs, **stage):
    layered = Layered()
    layered.lay({"method": {"stages": {"train": {"epochs": epochs, **stage}}}}, "a file")
    found, problems = resolve_percentages(layered)
    return layered.get(("method", "stages", "train")), found, problems


def steps(*shares, warmup="7.5%"):
    return {"lr_schedule": {"warmup_epochs": warmup, "milestones": [{"after_epoch": s, "factor": 0.1} for s in shares]}}


@pytest.mark.parametrize(
    ("epochs", "percentage", "expected"),
    [
        (200, "80%", 160), (24, "80%", 19), (24, "90%", 22), (40, "80%", 32), (10, "85%", 9), (10, "84.9%", 8),
        (200, "59.5%", 119), (180, "66.1%", 119), (90, "54.4%", 49), (30, "33.3 %", 10),
        (1, "33.3%", 1),  # at least one epoch
    ],
)  # fmt: skip
def test_a_percentage_is_rounded_half_up(epochs, percentage, expected):
    stage, found, problems = resolved(epochs, objective={"reweight_epoch": percentage})
    assert stage["objective"]["reweight_epoch"] == expected and problems == []
    assert [(f.key, f.percentage, f.epochs) for f in found] == [("objective.reweight_epoch", percentage, expected)]


def test_drops_and_warm_up_of_a_shortened_stage_come_earlier_in_proportion():
    assert resolved(40, **steps("80%", "90%"))[0]["lr_schedule"] == {
        "warmup_epochs": 3, "milestones": [{"after_epoch": 32, "factor": 0.1}, {"after_epoch": 36, "factor": 0.1}],
    }  # fmt: skip
    assert resolved(20, **steps("80%", "90%"))[0]["lr_schedule"] == {
        "warmup_epochs": 2, "milestones": [{"after_epoch": 16, "factor": 0.1}, {"after_epoch": 18, "factor": 0.1}],
    }  # fmt: skip


@pytest.mark.parametrize(("epochs", "left"), [(1, []), (2, []), (3, [2]), (4, [3]), (5, [4]), (8, [6, 7])])
def test_a_drop_that_rounds_to_the_end_is_left_out_and_a_warm_up_may_vanish(epochs, left):
    stage, found, problems = resolved(epochs, **steps("80%", "90%"))
    assert [drop["after_epoch"] for drop in stage["lr_schedule"]["milestones"]] == left and problems == []
    assert [f.left_out for f in found if f.key == DROPS] == [False] * len(left) + [True] * (2 - len(left))
    assert stage["lr_schedule"]["warmup_epochs"] == round(0.075 * epochs + 1e-9)


@pytest.mark.parametrize("epochs", [6, 7])
def test_two_drops_at_the_same_epoch_are_refused_with_a_length_that_would_do(epochs):
    _, _, [problem] = resolved(epochs, **steps("80%", "90%"))
    at = {6: 5, 7: 6}[epochs]
    assert problem == (
        f"method.stages.train.{DROPS}: 80% and 90% of {epochs} epochs both round to epoch {at}; needed different ones; "
        f"set epochs to 8, or after_epoch in whole epochs"
    )
    assert resolved(8, **steps("80%", "90%"))[2] == []


@pytest.mark.parametrize("second", ["80%", "80.0%", "80.000001%"])
def test_two_drops_at_the_same_share_of_any_stage_are_refused_without_a_length(second):
    _, _, [problem] = resolved(20, **steps("80%", second))
    assert problem == (
        f"method.stages.train.{DROPS}: 80% and {second} of 20 epochs both round to epoch 16; needed different ones; "
        f"change after_epoch of either"
    )


@pytest.mark.parametrize("share", ["0%", "100%", "120%", "-5%"])
def test_a_percentage_outside_the_stage_is_refused(share):
    for stage in ({"objective": {"reweight_epoch": share}}, steps(share), steps(warmup=share)):
        problems = resolved(20, **stage)[2]
        assert len(problems) == 1 and f" = {share}: needed more than 0% and less than 100% of" in problems[0]


def test_a_length_that_is_a_percentage_is_asked_for():
    assert resolved("80%")[2] == ["method.stages.train.epochs = 80%: of what? needed a whole number of epochs"]


def test_whole_epochs_and_texts_that_are_no_epochs_stay():
    kept = {"lr_schedule": {"milestones": [{"after_epoch": 5, "factor": 0.1}]}, "optimizer": {"lr": "80%"}}
    stage, found, problems = resolved(20, **kept)
    assert (stage, found, problems) == ({"epochs": 20, **kept}, [], [])


@pytest.mark.parametrize("epochs", [None, "many", True, -3, 0])
def test_a_length_that_is_refused_later_stops_nothing_here(epochs):
    assert resolved(epochs, objective={"reweight_epoch": "80%"})[2] == []
