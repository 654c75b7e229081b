"""The time of a step from what it asks and what was measured, with numbers one can do by hand."""

from __future__ import annotations

import pytest

from orchestration.preflight.prediction import (
    Circumstances,
    Link,
    Prediction,
    Speed,
    Step,
    exchange_s,
    fastest,
    fit_link,
    fit_speed,
    recommended,
    rounds,
    step_s,
)
from orchestration.preflight.traffic import Exchange
from orchestration.training.mesh import MeshShape

LINK = Link(latency_s=0.001, bytes_per_s=1e6)
PACKED, SPREAD, REPLICAS = MeshShape(3, 3), MeshShape(3, 1), MeshShape(3, 3, 3)


def test_two_steps_give_the_cost_of_calls_and_of_work():
    """32 images 0.5 s, 128 images 1.1 s: an image is 6.25 ms, what is left 0.3 s, over 600 calls and 2e8 a piece."""
    speed = fit_speed(600, 2e8, (32, 0.5), (128, 1.1))
    assert speed.call_s == pytest.approx(0.3 / 600)
    assert speed.work_s == pytest.approx(0.00625 / 2e8)


@pytest.mark.parametrize(("few_s", "call_s"), [(0.2, 0.0), (1.2, 1.1 / 600)])
def test_noise_makes_neither_calls_nor_images_cheaper_than_free(few_s, call_s):
    """A quarter of the images in less than a quarter of the time; more time for fewer images."""
    speed = fit_speed(600, 2e8, (32, few_s), (128, 1.1))
    assert speed.call_s == pytest.approx(call_s)
    assert speed.work_s >= 0
    assert 600 * speed.call_s + 128 * 2e8 * speed.work_s == pytest.approx(1.1), "the packed step is what was measured"


def test_one_measured_step_is_all_work():
    assert fit_speed(600, 2e8, (32, 0.64), (32, 0.64)).call_s == pytest.approx(0.02 * 32 / 600)


def test_two_all_reduces_give_latency_and_bandwidth():
    """Two workers: 2 rounds; 2 (n - 1) / n of the bytes are sent, here all of them. 1 MB in 1 s beside 2 ms."""
    link = fit_link(2, (1000, 0.003), (1_001_000, 1.003))
    assert link.bytes_per_s == pytest.approx(1e6)
    assert link.latency_s == pytest.approx(0.001)


def test_rings_have_rounds_and_send_parts():
    """Three workers, 3000 bytes each: an all-reduce sends 4/3 of them in 4 rounds, an all-gather 2 times in 2."""
    assert (rounds("all-reduce", 3), rounds("all-gather", 3)) == (4, 2)
    assert exchange_s(Exchange("a", "all-reduce", 3, (3000,)), LINK) == pytest.approx(0.004 + 0.004)
    assert exchange_s(Exchange("a", "all-gather", 3, (3000,)), LINK) == pytest.approx(0.002 + 0.006)
    often = Exchange("a", "all-gather", 3, (3000, 6000), times=10)
    assert exchange_s(often, LINK) == pytest.approx(0.02 + 0.012), "the slot that sends most, a latency each time"


def test_a_step_is_calls_work_and_exchanges():
    """100 calls of 1 ms, 8 images of 10 at 1 ms, 8 ms of exchanges; twice as many threads as CPUs slow work alone."""
    step = Step(100, 10.0, 8, (Exchange("a", "all-reduce", 3, (3000,)),))
    speed = Speed(call_s=0.001, work_s=0.001)
    assert step_s(step, Circumstances(speed, LINK)) == pytest.approx(0.1 + 0.08 + 0.008)
    assert step_s(step, Circumstances(speed, LINK, crowding=2.0)) == pytest.approx(0.2 + 0.16 + 0.008)


def said(shape, run_s):
    return Prediction(shape, {"train": run_s}, {"train": run_s}, run_s)


def test_of_placements_as_fast_the_one_that_sends_less_is_taken():
    sent = {SPREAD: 10, REPLICAS: 1000}
    assert fastest([said(SPREAD, 1.05), said(REPLICAS, 1.0)], sent).shape == SPREAD
    assert fastest([said(SPREAD, 1.0), said(REPLICAS, 1.05)], sent).shape == SPREAD, "whichever way noise goes"
    assert fastest([said(SPREAD, 1.2), said(REPLICAS, 1.0)], sent).shape == REPLICAS


def test_more_workers_are_recommended_only_where_they_are_worth_it():
    sent = {SPREAD: 10, REPLICAS: 1000}
    assert recommended(said(PACKED, 1.25), [said(SPREAD, 1.0), said(REPLICAS, 1.1)], sent).shape == PACKED
    assert recommended(said(PACKED, 1.35), [said(SPREAD, 1.0), said(REPLICAS, 1.1)], sent).shape == SPREAD
    assert recommended(said(PACKED, 2.0), [said(SPREAD, 1.6), said(REPLICAS, 1.0)], sent).shape == REPLICAS
