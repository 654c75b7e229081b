"""Learning rates of the published codes, epoch by epoch.

Origin: the schedules of RIDE @ ab8be5c, LDAM-DRW @ 2536330, classifier-balancing @ f162ade, the survey's code
@ 2c1ad2a, Long-Tailed-Recognition.pytorch @ 5c916d0, BalancedMetaSoftmax @ 34a61e4 and MiSLAS @ 0fc381e, run on CPU.
Tolerance: half a unit of the last printed decimal.
"""

from __future__ import annotations

import math

import pytest

from experts.progress import Progress
from experts.schedules import Cosine, Steps


def rate(schedule, base, epoch, epochs) -> float:
    return base * schedule.factor(Progress(epoch=epoch, epochs=epochs))


def check(schedule, base, epochs, published: dict[int, float]) -> None:
    found = {epoch: rate(schedule, base, epoch, epochs) for epoch in published}
    assert found == pytest.approx(published, abs=6e-7)


def steps(*milestones, **settings) -> Steps:
    drops = [{"after_epoch": after, "factor": factor} for after, factor in milestones]
    return Steps(Steps.Config(milestones=drops, **settings))


def test_ride_and_ldam_on_cifar():
    schedule = steps((160, 0.01), (180, 0.0001), warmup_epochs=5)
    found = {e: rate(schedule, 0.1, e, 200) for e in (1, 2, 5, 6, 160, 161, 180, 181, 200)}
    published = {1: 0.02, 2: 0.04, 5: 0.1, 6: 0.1, 160: 0.1, 161: 0.001, 180: 0.001, 181: 1e-5, 200: 1e-5}
    assert found == pytest.approx(published, rel=1e-12)


def test_ldam_by_epoch_index():
    schedule = steps((160, 0.01), (180, 0.0001), warmup_epochs=5)
    by_index = {0: 0.02, 1: 0.04, 4: 0.1, 5: 0.1, 159: 0.1, 160: 0.001, 179: 0.001, 180: 1e-5}
    found = {i: rate(schedule, 0.1, i + 1, 200) for i in by_index}
    assert found == pytest.approx(by_index, rel=1e-12)


def test_ride_on_imagenet_lt():
    """x0.1 from index 60, x0.01 from index 80."""
    schedule = steps((60, 0.1), (80, 0.01), warmup_epochs=5)
    check(schedule, 0.1, 100, {1: 0.02, 5: 0.1, 60: 0.1, 61: 0.01, 80: 0.01, 81: 0.001, 100: 0.001})


def test_tde_and_lade_warm_up_from_a_third():
    schedule = steps((119, 0.01), (159, 0.0001), warmup_epochs=5, warmup_start=1 / 3)
    published = {1: 0.093333, 2: 0.12, 3: 0.146667, 4: 0.173333, 5: 0.2, 119: 0.2, 120: 0.002, 159: 0.002, 160: 2e-5}
    check(schedule, 0.2, 200, published)


@pytest.mark.parametrize(
    ("epochs", "published"),
    [
        (90, {1: 0.199939, 2: 0.199756, 45: 0.1, 89: 0.000061, 90: 0.0}),
        (10, {1: 0.195106, 2: 0.180902, 5: 0.1, 9: 0.004894, 10: 0.0}),
    ],
)
def test_cosine_stepped_before_the_epoch(epochs, published):
    check(Cosine(Cosine.Config(stepped="before")), 0.2, epochs, published)


def test_balms_cosine_after_warm_up():
    """From 0.05 at epoch 1 to 0.1 at epoch 6: a line from 0.04 = 0.4 * 0.1 at epoch 0."""
    schedule = Cosine(Cosine.Config(stepped="before", warmup=6, warmup_start=0.4))
    published = {1: 0.05, 2: 0.06, 6: 0.1, 7: 0.099972, 50: 0.055005, 99: 0.000028, 100: 0.0}
    check(schedule, 0.1, 100, published)


def test_reslt_on_imagenet_lt_stops_a_step_before_zero():
    """Its code: a warm-up of 5 epochs, then 0.05 (1 + cos(pi (e - 4) / 176)) at index e = 5 .. 179."""
    schedule = Cosine(Cosine.Config(stepped="before", warmup=5, beyond=1))
    published = {0: 0.02, 4: 0.1, 5: 0.09999203, 90: 0.05178462, 179: 0.00000797}
    for index, expected in published.items():
        assert rate(schedule, 0.1, index + 1, 180) == pytest.approx(expected, abs=5e-9)


def test_mislas_cosine_by_epoch_index():
    schedule = Cosine(Cosine.Config())
    for index in (0, 1, 90, 179):
        assert rate(schedule, 0.1, index + 1, 180) == pytest.approx(0.05 * (1 + math.cos(math.pi * index / 180)))


def test_ride_router_stage_ends_above_zero():
    """Cosine over 5 epochs, stepped after each: the fifth has (1 + cos(0.8 pi)) / 2 of the rate."""
    check(Cosine(Cosine.Config()), 0.01, 5, {1: 0.01, 3: 0.006545, 5: 0.000955})
