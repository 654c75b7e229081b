"""Ramps against the curves of papers, worked out by hand and rounded to 6 decimals."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from experts.auxiliaries.supcon import SupCon
from experts.progress import Progress
from experts.ramps import Ramp, constant
from orchestration.config.compose import from_yaml, load_config, to_yaml
from orchestration.config.recipe_checks import parts_that_learn

AT = "method.stages.train"
WORDS = ["method=ce", "dataset=digits_lt", f"{AT}.epochs=40", f"{AT}.auxiliaries.near.name=triplet"]


def values(ramp, done, epochs):
    return [round(ramp.at(Progress(n + 1, epochs)), 6) for n in done]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("cosine", [1, 0.923880, 0.707107, 0.015707]),
        ("linear", [1, 0.75, 0.5, 0.01]),
        ("exponential", [1, 0.277390, 0.076945, 0.006232]),
        ("half_cosine", [1, 0.853553, 0.5, 0.000247]),
    ],
)
def test_shapes_are_the_schedules_of_dynamic_curriculum_learning(shape, expected):
    """After 0, 25, 50 and 99 of 100 epochs."""
    assert values(Ramp(ramp=shape, start=1, end=0), (0, 25, 50, 99), 100) == expected


def test_the_parabola_is_that_of_hybrid_networks_and_the_other_way_round_its_rest():
    falls, rises = Ramp(ramp="parabolic", start=1, end=0), Ramp(ramp="parabolic", start=0, end=1)
    expected = [1.0, 0.9375, 0.75, 0.009975]
    assert values(falls, (0, 50, 100, 199), 200) == expected
    assert values(rises, (0, 50, 100, 199), 200) == [round(1 - alpha, 6) for alpha in expected]


def test_it_ends_where_it_is_cut_and_stays_there_after_its_length():
    cut = Ramp(ramp="half_cosine", start=1.1, end=0.1, after_epoch=30)
    assert values(cut, (0, 29), 100) == [1.1, round(0.1 + 0.5 + 0.5 * math.cos(0.29 * math.pi), 6)]
    assert values(cut, (30, 99), 100) == [0.1, 0.1]
    assert values(Ramp(start=2, end=1, epochs=4), range(6), 10) == [2, 1.75, 1.5, 1.25, 1, 1]
    assert values(Ramp(ramp="step", start=0, end=1, after_epoch=2), range(4), 10) == [0, 0, 1, 1]


def test_the_product_is_the_number_of_the_moment_times_the_value():
    value = torch.tensor(3.0, dtype=torch.float64)
    assert Ramp(start=1, end=0).times(value, "w", Progress(2, 4), None) == 0.75 * value
    assert constant(1).times(value, "w", Progress(2, 4), None) is value
    assert constant(0.5).times(value, "w", Progress(2, 4), None) == 0.5 * value


def test_a_recipe_says_it_in_epochs_or_percentages_and_is_saved_as_it_was_written(tmp_path):
    ramp = "{ramp: half_cosine, start: 1, end: 0.1, after_epoch: 30%, epochs: 50%}"
    config = load_config([*WORDS, f"{AT}.auxiliaries.near.weight={ramp}", f"{AT}.objective_weight=0.5"])
    stage = config.method.stages["train"]
    assert stage.auxiliaries["near"].weight == Ramp(ramp="half_cosine", start=1, end=0.1, after_epoch=12, epochs=20)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert "objective_weight: 0.5" in (tmp_path / "config.yaml").read_text()
    assert from_yaml(tmp_path / "config.yaml") == config
    assert SupCon.Config(weight=2).model_dump()["weight"] == 2.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["auxiliaries.near.weight=-1"], "auxiliaries.near.weight = -1: needed 0 or more"),
        (["auxiliaries.near.weight={start: 1, end: -1}"], "auxiliaries.near.weight: needed 0 or more"),
        (
            ["auxiliaries.near.weight=much"],
            "near.weight = much: needed a finite number, or a ramp, as {ramp:",
        ),
        (["auxiliaries.near.weight={ramp: step, start: 1, end: 0}"], "auxiliaries.near.weight: after_epoch: not set"),
        (["auxiliaries.near.weight={start: 1, end: 0, base: 0.9}"], "weight: base = 0.9: ramp 'linear' has none"),
        (["auxiliaries.near.weight={start: 1, end: 0, until: 3}"], "near.weight.until: unknown key"),
        (["objective.name=no_loss", "objective_weight=0.5"], "objective_weight: objective 'no_loss' is always 0"),
    ],
)
def test_what_makes_no_ramp_is_refused_by_its_key(words, said):
    with pytest.raises(ValueError, match=r"problem") as refusal:
        load_config([*WORDS, *(f"{AT}.{word}" for word in words)])
    assert said in str(refusal.value)


def test_what_learns_beside_the_experts_has_a_rate_of_its_own_and_can_be_frozen():
    config = load_config([*WORDS, f"{AT}.lr_factors.auxiliaries=0.1"])
    assert config.method.stages["train"].lr_factors.auxiliaries == 0.1
    frozen = load_config([*WORDS, f"{AT}.freeze=[auxiliaries]"])
    assert "auxiliaries" not in parts_that_learn(frozen.method, "train")
    with pytest.raises(ValueError, match="the stage has no auxiliaries; leave them out"):
        load_config([*WORDS[:3], f"{AT}.freeze=[auxiliaries]"])


def test_a_sum_of_which_nothing_counts_is_refused():
    from experts.losses.composed import Sum  # here, because its schema needs all pieces to be registered

    with pytest.raises(ValidationError, match="all terms count nothing"):
        Sum.Config(weights={"cross_entropy": 0})
    assert Sum.Config(weights={"cross_entropy": {"start": 0, "end": 1}}).weight("cross_entropy").end == 1
