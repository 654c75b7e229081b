"""Every registered learning-rate schedule is a pure function of progress within sensible bounds."""

from __future__ import annotations

import pytest

import experts
from experts import registry
from experts.cases import cases_of
from experts.progress import Progress

registry.import_pieces(experts)
CASES = [case.config for name in registry.registered_names("lr_schedule") for case in cases_of("lr_schedule", name)]
every_schedule = pytest.mark.parametrize("config", CASES, ids=repr)


def schedule(config):
    return registry.build("lr_schedule", config)


def all_steps(epochs=6, steps_per_epoch=4):
    return [
        Progress(epoch=epoch, epochs=epochs, step=step, steps_per_epoch=steps_per_epoch)
        for epoch in range(1, epochs + 1)
        for step in range(steps_per_epoch)
    ]


def test_the_schedules_of_the_recipes_are_registered():
    assert {"steps", "cosine"} <= set(registry.registered_names("lr_schedule"))


@every_schedule
def test_factors_lie_between_zero_and_one_and_the_first_is_positive(config):
    factors = [schedule(config).factor(progress) for progress in all_steps()]
    assert all(isinstance(factor, float) and 0 <= factor <= 1 for factor in factors)
    assert factors[0] > 0


@every_schedule
def test_asking_in_any_order_gives_the_same_factors(config):
    one, other = schedule(config), schedule(config)
    forward = [one.factor(progress) for progress in all_steps()]
    backward = [other.factor(progress) for progress in reversed(all_steps())]
    assert forward == backward[::-1]


@every_schedule
def test_a_stage_of_one_step_has_a_factor(config):
    assert 0 <= schedule(config).factor(Progress(epoch=1, epochs=1)) <= 1
