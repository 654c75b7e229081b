"""A measurement goes on without what fails, and the slower of two workers counts; Ray is a fake."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from orchestration.preflight import node_speed
from orchestration.preflight.node_speed import Task, measure
from orchestration.training.mesh import MeshShape

PACKED, SPREAD = MeshShape(2, 2), MeshShape(2, 1)
LINK = [(1024, 0.001), (2**22, 0.01)]


class Gauge:
    """Answers at once: so many seconds per step, or an error."""

    def __init__(self, step_s):
        self.step_s = step_s

    def __getattr__(self, name):
        answers = {
            "load": None,
            "time_step": self.step_s,
            "open_world": ("10.0.0.1", 7),
            "time_all_reduce": LINK,
        }
        return SimpleNamespace(remote=lambda *args: answers[name])


@pytest.fixture
def found(monkeypatch):
    """Return a function that measures with a first gauge and a partner that take so long."""

    def get(asked, timeout):
        for answer in asked if isinstance(asked, list) else [asked]:
            if isinstance(answer, Exception):
                raise answer
        return asked

    def measured(first, partner):
        gauges = contextlib.nullcontext((Gauge(first), {"inside a node": Gauge(partner)}))
        monkeypatch.setattr(node_speed, "_gauges", lambda task: gauges)
        configs = dict.fromkeys((PACKED, SPREAD))
        threads = dict.fromkeys(configs, 1)
        counts = {"train": np.ones(2)}
        return measure(
            Task(configs, threads, counts, "a", {"inside a node": "a"}, {SPREAD: "inside a node"}, {"CPU": 1})
        )

    monkeypatch.setattr(node_speed.ray, "get", get)
    return measured


def test_of_two_workers_that_step_at_once_the_slower_counts(found):
    measured = found(0.2, 0.3)
    assert measured.compute_s == {PACKED: {"train": 0.2}, SPREAD: {"train": 0.3}}
    assert measured.links == {"inside a node": LINK} and not measured.problems


def test_what_fails_is_left_out_with_its_reason_and_the_rest_is_kept(found):
    measured = found(0.2, GetTimeoutError())
    assert measured.compute_s == {PACKED: {"train": 0.2}} and measured.links
    [problem] = measured.problems
    assert problem.startswith("a step of 2 workers was not measured: no answer in time")
    measured = found(ActorDiedError(), 0.3)
    assert not measured.compute_s and len(measured.problems) == 2
