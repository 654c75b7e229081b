"""Every registered learning-rate schedule is a pure function of progress within sensible bounds."""

from __future__ import annotations

import pytest

import experts
from experts import registry
from experts.progress import Progress

registry.import_pieces(experts)
every_schedule = pytest.mark.parametrize("name", registry.names("lr_schedule"))


def schedule(name):
    return registry.build("lr_schedule", registry.piece("lr_schedule", name).Config())


def all_steps(epochs=6, steps_per_epoch=4):
    return [
        Progress(epoch=epoch, epochs=epochs, step=step, steps_per_epoch=steps_per_epoch)
        for epoch in range(1, epochs + 1)
        for step in range(steps_per_epoch)
    ]


def test_the_schedules_of_the_main_job_are_registered():
    assert {"steps", "cosine"} <= set(registry.names("lr_schedule"))


@every_schedule
def test_factors_lie_between_zero_and_one_and_the_first_is_positive(name):
    factors = [schedule(name).factor(progress) for progress in all_steps()]
    assert all(isinstance(factor, float) and 0 <= factor <= 1 for factor in factors)
    assert factors[0] > 0


@every_schedule
def test_asking_in_any_order_gives_the_same_factors(name):
    one, other = schedule(name), schedule(name)
    forward = [one.factor(progress) for progress in all_steps()]
    backward = [other.factor(progress) for progress in reversed(all_steps())]
    assert forward == backward[::-1]


@every_schedule
def test_a_stage_of_one_step_has_a_factor(name):
    assert 0 <= schedule(name).factor(Progress(epoch=1, epochs=1)) <= 1
