"""Settings of the schedules and the corners between their parts; parity/test_schedules.py has published runs."""

from __future__ import annotations

import pytest

from experts.progress import Progress
from experts.schedules import Cosine, Steps


def test_without_settings_the_rate_is_constant():
    schedule = Steps(Steps.Config())
    assert {schedule.factor(Progress(epoch, 7)) for epoch in range(1, 8)} == {1.0}


def test_settings_are_read_from_plain_data():
    config = Steps.Config.model_validate(
        {"name": "steps", "warmup_epochs": 2, "milestones": [{"after_epoch": 2, "factor": 0.5}]}
    )
    assert [Steps(config).factor(Progress(epoch, 4)) for epoch in (1, 2, 3, 4)] == [0.5, 1.0, 0.5, 0.5]
    assert Steps.Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"milestones": [{"after_epoch": 5, "factor": 0.1}, {"after_epoch": 3, "factor": 0.01}]}, "must increase"),
        ({"milestones": [{"after_epoch": 5, "factor": 0.1}, {"after_epoch": 5, "factor": 0.01}]}, "must increase"),
        ({"warmup_epochs": 5, "milestones": [{"after_epoch": 4, "factor": 0.1}]}, "inside the warm-up of 5"),
        ({"milestones": [{"after_epoch": -1, "factor": 0.1}]}, "after_epoch"),
        ({"milestones": [{"after_epoch": 1, "factor": -0.1}]}, "factor"),
        ({"milestones": [{"epoch": 1, "factor": 0.1}]}, "epoch"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"warmup_start": 1.1}, "warmup_start"),
    ],
)
def test_steps_that_make_no_sense_are_refused_by_key(settings, message):
    with pytest.raises(ValueError, match=message):
        Steps.Config(**settings)


def test_cosine_per_step_moves_within_an_epoch():
    """2 epochs of 2 steps, stepped after: (1 + cos(pi i / 4)) / 2 at steps i = 0 .. 3."""
    schedule = Cosine(Cosine.Config(unit="step"))
    found = [schedule.factor(Progress(epoch, 2, step, 2)) for epoch in (1, 2) for step in (0, 1)]
    assert found == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_cosine_per_epoch_does_not_move_within_an_epoch():
    schedule = Cosine(Cosine.Config())
    assert len({schedule.factor(Progress(2, 4, step, 10)) for step in range(10)}) == 1


def test_cosine_after_warm_up_starts_at_the_full_rate_and_ends_at_zero_if_stepped_before():
    after = Cosine(Cosine.Config(warmup=2))
    assert [after.factor(Progress(epoch, 4)) for epoch in (1, 2, 3, 4)] == pytest.approx([0.5, 1, 1, 0.5])
    before = Cosine(Cosine.Config(warmup=2, stepped="before"))
    assert [before.factor(Progress(epoch, 4)) for epoch in (1, 2, 3, 4)] == pytest.approx([0.5, 1, 0.5, 0])


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_warm_up_that_fills_the_stage_is_refused(unit):
    schedule = Cosine(Cosine.Config(warmup=6, unit=unit))
    with pytest.raises(ValueError, match=f"lr_schedule.warmup = 6 {unit}s, but the stage has 6"):
        schedule.factor(Progress(1, 6) if unit == "epoch" else Progress(1, 2, 0, 3))
