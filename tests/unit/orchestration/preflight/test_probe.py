"""The times that follow from a probe's measurements, with numbers one can do by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestration.config.compose import load_config
from orchestration.config.run_config import RunSettings
from orchestration.preflight.probe import Probe, StageProbe, count_due, time_lines

STAGE = StageProbe(
    name="train", batch_size=100, step_s=(0.1,) * 8 + (0.2,) * 2, call_s=0.01, begin_s=2.0, evaluation_s=3.0,
    save_s=0.5, steps=1000, images=90_000, evaluations=10, saves=12, peak_gib=1.25,
)  # fmt: skip


def found(*stages, words=(), at_once=1):
    config = load_config(["cluster.cpus_per_worker=2", *words])
    return Probe(config, {"Ray": 4.0, "libraries": 6.0}, stages, at_once)


def test_a_stage_takes_its_steps_evaluations_and_checkpoints():
    """90,000 images are 900 full batches: 90 s at 0.1 s; an interval a second is 100 calls of 0.01 s; 2 s to begin,
    10 evaluations of 3 s, 12 checkpoints of 0.5 s."""
    assert STAGE.seconds(0.1) == pytest.approx(90 + 1 + 2 + 30 + 6)
    assert replace(STAGE, call_s=0.0).seconds(0.2) == pytest.approx(180 + 2 + 30 + 6)


def test_steps_longer_than_an_interval_are_called_one_by_one():
    assert STAGE.seconds(2.0) - replace(STAGE, call_s=0.0).seconds(2.0) == pytest.approx(1000 * 0.01)


def test_the_spread_is_that_of_the_middle_eighty_percent():
    assert STAGE.spread() == pytest.approx((0.12, 0.1, 0.2))
    outlier = replace(STAGE, step_s=(0.1,) * 19 + (2.1,))
    assert outlier.spread() == pytest.approx((0.2, 0.1, 0.2)), "never without the mean"


def test_a_run_is_its_start_and_its_stages():
    run = found(STAGE, words=["method=ce", "cluster.workers=2"])
    stage = STAGE.seconds(0.12)
    assert run.wall_s(0) == pytest.approx(10 + stage)
    assert run.wall_s(1) < run.wall_s(0) < run.wall_s(2)
    assert run.worker_s() == pytest.approx(2 * (6 + stage))
    text = "\n".join(time_lines(run))
    assert f"0 GPU-hours, {2 * 2 * (6 + stage) / 3600:.3g} CPU-hours of 2 workers" in text
    assert "10 x 3.00 s" in text and "0.1 to 0.2" in text and "1.25 GiB (measured)" in text and "not included: " in text


def test_the_memory_of_a_gpu_is_told_where_there_is_one():
    assert "1.25 GiB (measured)" in "\n".join(time_lines(found(STAGE)))
    on_gpu = [replace(STAGE, gpu_peak_gib=gib) for gib in (2.5, 1.0)]
    assert "1.25 GiB, of its GPU 2.50 GiB (measured)" in "\n".join(time_lines(found(*on_gpu)))


def test_stages_side_by_side_share_the_workers():
    """LFME's three experts and its student: one set of workers takes the sum; of two sets, one takes two."""
    stages = [replace(STAGE, name=name) for name in ("many", "medium", "few", "student")]
    one = STAGE.seconds(STAGE.spread()[0])
    for at_once, in_turn in ((1, 4), (2, 3), (3, 2)):
        assert found(*stages, words=["method=lfme"], at_once=at_once).wall_s(0) == pytest.approx(10 + in_turn * one)


def test_a_stage_that_run_max_steps_leaves_out_takes_nothing():
    assert found(STAGE, words=["method=ride_h2t"]).wall_s(0) == pytest.approx(10 + STAGE.seconds(0.12))


@pytest.mark.parametrize(
    ("steps", "words", "evaluations", "saves"),
    [
        (30, {}, 3, 3),  # every epoch of 10 steps, a checkpoint with each
        (30, {"checkpoint_every_steps": 10}, 3, 3),  # always together
        (30, {"checkpoint_every_steps": 4}, 3, 9),  # at 4, 8, ... 28; 20 is an epoch's end as well
        (30, {"evaluate_every_epochs": 2}, 2, 2),  # after two epochs and at the end
        (20, {"evaluate_every_epochs": 2}, 1, 1),
        (10, {"evaluate_every_epochs": 2}, 1, 1),  # run.max_steps ends it where nothing is due
        (15, {}, 2, 2),
        (15, {"checkpoint_every_steps": 5}, 2, 4),  # 5, 10, 15, and once more with the evaluation at the end
    ],
)
def test_what_is_due_at_one_step_is_saved_once(steps, words, evaluations, saves):
    assert count_due(steps, 30, 10, RunSettings(**words)) == (evaluations, saves)
