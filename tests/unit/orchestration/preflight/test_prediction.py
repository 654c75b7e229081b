"""The time of a step from what it asks and what was measured, with numbers one can do by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestration.preflight.prediction import (
    Link,
    Prediction,
    Speed,
    Step,
    assumed_compute_s,
    busiest_work,
    exchange_s,
    fastest,
    fit_link,
    predict,
    recommended,
    rounds,
    step_of,
)
from orchestration.preflight.traffic import Exchange
from orchestration.training.mesh import MeshShape

LINK = Link(latency_s=0.001, bytes_per_s=1e6)
PACKED, SPREAD, REPLICAS = MeshShape(3, 3), MeshShape(3, 1), MeshShape(3, 3, 3)


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


def test_a_step_is_compute_and_exchanges():
    """A step of 0.18 s on twice as many threads as CPUs, and 8 ms of exchanges; 2 epochs of 10 steps."""
    exchange = Exchange("a", "all-reduce", 3, (3000,))
    stage = SimpleNamespace(
        name="train", epochs=2, steps_per_epoch=10, shares=(8,), slot_work=(10.0,), slot_calls=(100,),
        exchanges=(exchange,),
    )  # fmt: skip
    found = predict(SPREAD, [stage], {"train": 0.18}, LINK, crowding=2.0)
    assert found.step_s["train"] == pytest.approx(0.36 + 0.008)
    assert found.epoch_s["train"] == pytest.approx(3.68) and found.run_s == pytest.approx(7.36)
    assert busiest_work([stage]) == 2 * 10 * 8 * 10.0
    stage.steps_per_epoch = None
    assert predict(SPREAD, [stage], {"train": 0.18}, LINK).epoch_s["train"] is None
    stage.slot_work = None
    assert predict(SPREAD, [stage], {"train": 0.18}, LINK) is None and busiest_work([stage]) is None


def test_the_busiest_slot_counts():
    stage = SimpleNamespace(shares=(8,), slot_work=(10.0, 30.0, 20.0), slot_calls=(5, 6, 7), exchanges=())
    assert step_of(stage) == Step(6, 30.0, 8)


def test_compute_is_assumed_from_calls_and_work():
    """100 calls of 1 ms and 8 images of 10 at 1 ms."""
    assert assumed_compute_s(Step(100, 10.0, 8), Speed(0.001, 0.001)) == pytest.approx(0.1 + 0.08)


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
