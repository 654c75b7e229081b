"""Steps and exchanges that are timed for a prediction."""

from __future__ import annotations

import pytest
import torch

from orchestration.config.compose import load_config
from orchestration.preflight import gauge
from orchestration.preflight.gauge import time_all_reduce, time_steps
from orchestration.preflight.plan import blank_counts
from orchestration.training.exchange import Alone


@pytest.mark.parametrize(
    ("method", "stage"), [("ride", "train"), ("lfme", "student"), ("ride_h2t", "h2t"), ("bbn", "train")]
)
def test_a_step_of_every_kind_is_timed_without_data_weights_or_teachers(method, stage):
    config = load_config([f"method={method}", "dataset=digits_lt", "dataset.image_size=16"])
    found = time_steps(config, stage, blank_counts(config, stage), (2, 8))
    assert [images for images, _ in found] == [2, 8]
    assert all(seconds > 0 for _, seconds in found)


def test_a_long_step_is_taken_once_and_not_with_more_images(monkeypatch):
    config = load_config(["method=ce", "dataset=digits_lt", "dataset.image_size=16"])
    monkeypatch.setattr(gauge, "_SLOW_S", 0.0)
    taken = []
    real = gauge.TrainingStep.__call__
    monkeypatch.setattr(gauge.TrainingStep, "__call__", lambda *args: taken.append(args) or real(*args))
    found = time_steps(config, "train", blank_counts(config, "train"), (2, 8))
    assert [images for images, _ in found] == [2] and len(taken) == 1


def test_all_reduces_are_timed_with_few_and_with_many_bytes(monkeypatch):
    sizes = []

    class Group(Alone):
        def all_reduce(self, values, what):
            sizes.append(values.numel() * values.element_size())

    (small, _), (large, _) = time_all_reduce(Group(), torch.device("cpu"))
    assert (small, large) == (gauge.SMALL, gauge.LARGE)
    assert set(sizes) == {small, large}
