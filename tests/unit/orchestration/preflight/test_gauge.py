"""Steps and exchanges that are timed for a prediction."""

from __future__ import annotations

import pytest
import torch

from orchestration.config.compose import load_config
from orchestration.preflight import gauge
from orchestration.preflight.gauge import time_all_reduce, time_step
from orchestration.preflight.plan import blank_counts
from orchestration.training.exchange import Alone


def config(method, *words):
    return load_config([f"method={method}", "dataset=digits_lt", "dataset.image_size=16", *words])


@pytest.mark.parametrize(
    ("method", "stage"), [("ride", "train"), ("lfme", "student"), ("ride_h2t", "h2t"), ("bbn", "train")]
)
def test_a_step_of_every_kind_is_timed_without_data_weights_teachers_or_partners(method, stage):
    experts = config(method).method.num_experts
    for words in (
        [],
        [f"cluster.workers={2 * experts}"],
        ["cluster.workers=2", f"cluster.experts_per_worker={experts}"],
    ):
        asked = config(method, f"method.stages.{stage}.batch_size=8", *words)
        assert time_step(asked, stage, blank_counts(asked, stage)) > 0


def test_a_replica_computes_its_share_of_the_images_and_a_slot_its_experts(monkeypatch):
    """With 9 images and 3 experts: all; all images of one expert; 5 of two replicas' images, with all experts."""
    seen = []
    monkeypatch.setattr(gauge, "_ENOUGH_S", 0.0)
    monkeypatch.setattr(gauge, "_timed", lambda action, device: action() or 0.001)
    monkeypatch.setattr(gauge.TrainingStep, "__call__", lambda step, batch, now: seen.append((step._setup, batch)))
    for words in ([], ["cluster.workers=3"], ["cluster.workers=2", "cluster.experts_per_worker=3"]):
        asked = config("ride", "method.stages.train.batch_size=9", *words)
        time_step(asked, "train", blank_counts(asked, "train"))
    found = [(len(setup.model.experts), len(batch.labels_B), len(batch.global_labels)) for setup, batch in seen]
    assert list(dict.fromkeys(found)) == [(3, 9, 9), (1, 9, 9), (3, 5, 10)]


def test_a_long_step_is_taken_once(monkeypatch):
    monkeypatch.setattr(gauge, "_SLOW_S", 0.0)
    taken = []
    real = gauge.TrainingStep.__call__
    monkeypatch.setattr(gauge.TrainingStep, "__call__", lambda *args: taken.append(args) or real(*args))
    asked = config("ce")
    assert time_step(asked, "train", blank_counts(asked, "train")) > 0
    assert len(taken) == 1


def test_all_reduces_are_timed_with_few_and_with_many_bytes(monkeypatch):
    sizes = []

    class Group(Alone):
        def all_reduce(self, values, what):
            sizes.append(values.numel() * values.element_size())

    (small, _), (large, _) = time_all_reduce(Group(), torch.device("cpu"))
    assert (small, large) == (gauge.SMALL, gauge.LARGE)
    assert set(sizes) == {small, large}
