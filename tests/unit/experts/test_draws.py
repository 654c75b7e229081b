"""Draws of an image depend on its row in the epoch, not on the replica that has it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from experts.batches import Replica, StreamConfig, TrainBatches
from experts.data.config import DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.keyed_random import key
from experts.draws import Moment, StepDraws
from experts.registry import build
from experts.samplers.instance_balanced import InstanceBalanced


def batches(replicas, index):
    dataset = open_dataset(DATA)
    config = StreamConfig(seed=3, stage="train", stream="all", epochs=2, batch_size=7)
    sampler = build("sampler", InstanceBalanced.Config(), dataset.train.labels, dataset.num_classes)
    return TrainBatches(dataset.train, sampler, DATA, config, Replica(index, replicas))


DATA = DatasetConfig.model_validate(
    {"name": "digits_lt", "source": "digits", "imbalance_ratio": 20, "test_per_class": 20}
)


def draws(batch, what="noise", epoch=2, label_set=0):
    drawn = StepDraws(partial(key, 3, "train"))
    drawn.begin(Moment(epoch, 0, batch.first_row, len(batch.labels_B), 0, len(batch.global_labels)))
    return drawn.of_rows(label_set)(what, 5)


@pytest.mark.parametrize("replicas", [2, 3, 9])
@pytest.mark.parametrize("step", [0, 4, -1])
def test_the_draws_of_replicas_are_those_of_one(replicas, step):
    """The last batch of an epoch is smaller; of 9 replicas some have no image."""
    whole = batches(1, 0)
    step = step % whole.steps_per_epoch
    found = [draws(batches(replicas, index).batch(2, step)) for index in range(replicas)]
    assert torch.equal(torch.cat(found), draws(whole.batch(2, step)))
    assert torch.cat(found).dtype == torch.float64


def test_every_row_epoch_quantity_and_label_set_has_its_own():
    one = batches(1, 0)
    first = draws(one.batch(2, 0))
    others = [draws(one.batch(2, 1)), draws(one.batch(2, 0), epoch=1), draws(one.batch(2, 0), "mask")]
    others.append(draws(one.batch(2, 0), label_set=1))
    assert all(not torch.equal(first, other) for other in others)
    assert len(first.unique()) == first.numel()
    assert torch.equal(first, draws(one.batch(2, 0)))


def test_held_draws_are_those_of_the_step_that_has_begun():
    """A replayed step reads them from the same place, and asks nothing again."""
    draws = StepDraws(partial(key, 3, "train"))

    def at(epoch, step, first_row):
        draws.begin(Moment(epoch, step, first_row, 4, 20 * step, 20))

    def asked():
        mine, everyones = draws.of_rows()("noise", 3), draws.of_rows(1, whole=True)("noise", 3)
        return [mine, everyones, draws("order", lambda moment: np.array([moment.epoch, moment.step]))]

    at(1, 0, 8)
    first = asked()
    held = draws.hold()
    with draws.handing_out(held):
        at(1, 0, 8)
        static = asked()
    assert all(torch.equal(a, b) for a, b in zip(static, first, strict=True))
    at(2, 1, 28)
    draws.refill(held)
    fresh = asked()
    assert [tensor.shape for tensor in fresh] == [(4, 3), (20, 3), (2,)]
    for place, now, before in zip(static, fresh, first, strict=True):
        assert torch.equal(place, now)
        assert not torch.equal(place, before)
    assert torch.equal(fresh[1][8:12], draws_of_set(draws, 1))


def draws_of_set(draws, label_set):
    draws.begin(Moment(2, 1, 28, 4))
    return draws.of_rows(label_set)("noise", 3)


def test_features_in_place_of_pixels_keep_the_rows():
    whole = batches(2, 1)
    features = [torch.zeros(len(whole.store.labels), 4)]
    rows = [batch.first_row for batch in whole.of_features(features, 1)]
    assert rows == [whole.batch(1, step).first_row for step in range(whole.steps_per_epoch)]
    assert rows[:3] == [4, 11, 18]
