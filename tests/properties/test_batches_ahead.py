"""Pixels are made for many steps at once where that is faster; nobody can tell, and no step waits for the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import experts
from experts import registry
from experts.augmentation.stack import Stack
from experts.batches import AHEAD_BYTES, Batch, Replica, StreamConfig, TrainBatches, on_host
from experts.data.config import Augment, ColorJitter, DatasetConfig
from experts.data.images import ResidentImages
from experts.data.keyed_random import KeyedRandom, key
from experts.mixing.cmo import CMO
from experts.mixing.cutmix import CutMix
from experts.mixing.mixup import Mixup
from experts.mixing.remix import Remix
from experts.samplers.instance_balanced import InstanceBalanced
from tests.emulated_device import DEVICE, EmulatedDevice, OnDevice

registry.import_pieces(experts)  # CMO's config takes any sampler

JITTER = ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2)
STEPS = {
    "nothing": Augment(),
    "crop": Augment(crop_padding=2),
    "mirror": Augment(horizontal_flip=0.5),
    "rotation": Augment(rotation=15),
    "jitter": Augment(color_jitter=JITTER),
    "resized crop": Augment(random_resized_crop=(0.2, 1.0)),
    "all": Augment(random_resized_crop=(0.2, 1.0), horizontal_flip=0.5, rotation=15, color_jitter=JITTER),
}
MIXUP = Mixup.Config(alpha=0.5)
MIXINGS = {
    "plain": None,
    "mixup": MIXUP,
    "remix": Remix.Config(kappa=1.2),
    "cutmix": CutMix.Config(),
    "cutmix, some steps": CutMix.Config(probability=0.6),
    "cmo": CMO.Config(quiet_first=0, quiet_last=0, probability=0.6),
    "cmo, all steps": CMO.Config(quiet_first=0, quiet_last=0, probability=1),
}
every_mixing = pytest.mark.parametrize("mixing", MIXINGS.values(), ids=MIXINGS)
every_way = pytest.mark.parametrize(
    ("augment", "mixing"),
    [(STEPS[step], MIXINGS[name]) for name in MIXINGS for step in (STEPS if name in ("plain", "mixup") else ["all"])],
    ids=[f"{step}, {name}" for name in MIXINGS for step in (STEPS if name in ("plain", "mixup") else ["all"])],
)
WHOLE = Replica()
IMAGES, BATCH, SIZE = 43, 8, 12  # six steps, the last of three images


def store(channels=3, size=SIZE, images=IMAGES):
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (images, channels, size, size), dtype=np.uint8)
    return ResidentImages(torch.from_numpy(pixels), draws.permutation(images) % 3)


def batches(augment=STEPS["all"], replica=WHOLE, mixing=None, images=None, batch_size=BATCH):
    images = images or store()
    config = DatasetConfig(
        name="made up", source="cifar10", image_size=images.images.shape[-1], augment=augment, mean=(0.5, 0.4, 0.3)
    )
    stream = StreamConfig(seed=1, stage="s", stream="m", epochs=2, batch_size=batch_size)
    sampler = InstanceBalanced(InstanceBalanced.Config(), images.labels, 3)
    if mixing is None:
        return TrainBatches(images, sampler, config, stream, replica)
    second = mixing.second_sampler and registry.build("sampler", mixing.second_sampler, images.labels, 3)
    return TrainBatches(
        images, sampler, config, stream, replica, registry.build("mixing", mixing, sampler.counts_C), second
    )


def tensors(batch: Batch):
    mixed = batch.mixed
    more = [] if mixed is None else [mixed.share, mixed.rest, mixed.labels_B, mixed.global_labels]
    found = [batch.images_B3HW, batch.labels_B, batch.global_labels, batch.positions_B, *more]
    return [value.inner if isinstance(value, OnDevice) else value for value in found]


def assert_same(one: Batch, other: Batch):
    assert one.first_row == other.first_row
    assert (one.mixed is None) == (other.mixed is None)
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@every_way
@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_pixels_made_ahead_are_those_of_single_steps(augment, mixing, replicas):
    """Five replicas share a last batch of three images."""
    for index in range(replicas):
        loader = batches(augment, Replica(index, replicas), mixing)
        single = [loader.batch(2, step) for step in range(loader.steps_per_epoch)]
        for ahead, first in ((1, 0), (2, 0), (4, 1), (100, 3)):
            loader.steps_ahead = ahead
            for one, other in zip(loader.iterate(2, first), single[first:], strict=True):
                assert_same(one, other)


def test_one_channel_and_float64_are_made_ahead_too():
    loader = batches(replica=Replica(dtype=torch.float64), images=store(channels=1))
    single = [loader.batch(1, step) for step in range(loader.steps_per_epoch)]
    loader.steps_ahead = 4
    for one, other in zip(loader.iterate(1), single, strict=True):
        assert one.images_B3HW.dtype == torch.float64
        assert_same(one, other)


@pytest.mark.parametrize("mixing", [None, MIXUP], ids=["plain", "mixup"])
def test_a_resumed_epoch_makes_no_pixels_of_steps_that_are_done(mixing, monkeypatch):
    made = []
    call = Stack.__call__
    monkeypatch.setattr(
        Stack, "__call__", lambda stack, raw, *rest, **more: made.append(len(raw)) or call(stack, raw, *rest, **more)
    )
    loader = batches(mixing=mixing)
    loader.steps_ahead = 3
    list(loader.iterate(1, 2))
    assert made == [3 * BATCH, 3]
    made.clear()
    list(loader.iterate(1, 1, 3))
    assert made == [2 * BATCH]


@every_way
@pytest.mark.parametrize("replica", [Replica(device=DEVICE), Replica(1, 3, DEVICE)], ids=["alone", "second of three"])
def test_a_device_gets_the_cpus_pixels_and_the_host_waits_for_none_of_them(augment, mixing, replica):
    expected = list(batches(augment, replace(replica, device="cpu"), mixing).iterate(1))
    with EmulatedDevice() as seen:
        loader = batches(augment, replica, mixing)
        for ahead, first in ((loader.steps_ahead, 0), (2, 0), (2, 3)):
            loader.steps_ahead = ahead
            seen.waits.clear()
            found = list(loader.iterate(1, first))
            assert not seen.waits
            for one, other in zip(found, expected[first:], strict=True):
                assert_same(one, other)


@every_mixing
def test_a_step_launches_nothing_on_the_device(mixing):
    with EmulatedDevice() as seen:
        upcoming = batches(replica=Replica(device=DEVICE), mixing=mixing).iterate(1)
        next(upcoming)
        seen.launches.clear()
        assert len(list(upcoming)) == 5
        assert not seen.launches


def test_features_come_without_a_wait():
    with EmulatedDevice() as seen:
        loader = batches(replica=Replica(device=DEVICE))
        features = torch.arange(float(IMAGES), device=DEVICE)[:, None]
        seen.waits.clear()
        found = list(loader.of_features([features], 1))
        assert not seen.waits
        rows = torch.cat([batch.features[0] for batch in found])[:, 0].tolist()
    assert rows == loader.positions(1).tolist()


@pytest.mark.parametrize(
    ("size", "batch_size", "replicas", "mixing", "expected"),
    [
        (32, 128, 1, None, AHEAD_BYTES // (128 * 3 * 32 * 32 * 4)),
        (32, 128, 3, None, AHEAD_BYTES // (43 * 3 * 32 * 32 * 4)),
        (32, 128, 3, MIXUP, AHEAD_BYTES // (128 * 3 * 32 * 32 * 4)),
        (32, 128, 3, CMO.Config(), AHEAD_BYTES // (2 * 43 * 3 * 32 * 32 * 4)),
        (224, 1024, 1, None, 1),
    ],
)
def test_as_many_steps_are_made_ahead_as_fit(size, batch_size, replicas, mixing, expected):
    """12,288 bytes of an image of 32 x 32: 341 batches of 128, four times an epoch of CIFAR-100-LT."""
    black = ResidentImages(torch.zeros(1, 3, size, size, dtype=torch.uint8).expand(3, -1, -1, -1), np.arange(3))
    assert batches(images=black, batch_size=batch_size).steps_ahead == 1
    with EmulatedDevice():
        there = batches(STEPS["crop"], Replica(0, replicas, DEVICE), mixing, black, batch_size)
    assert there.steps_ahead == expected


@pytest.mark.parametrize("replicas", [1, 3])
def test_labels_lie_on_the_host_too(replicas):
    for index in range(replicas):
        for batch in batches(replica=Replica(index, replicas), mixing=MIXUP).iterate(1):
            for held in (batch, batch.mixed):
                assert on_host(held).labels_B.tolist() == held.labels_B.tolist()
                assert on_host(held).global_labels.tolist() == held.global_labels.tolist()
                read = on_host(replace(held, host_labels=None))
                assert read.labels_B.tolist() == held.labels_B.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_a_blend_are_rounded_from_doubles(dtype):
    for step, batch in enumerate(batches(replica=Replica(dtype=dtype), mixing=MIXUP).iterate(1)):
        share = KeyedRandom(key(1, "s", 1, "m", f"mixup share/{step}")).betavariate(0.5, 0.5)
        assert torch.equal(batch.mixed.share, torch.tensor(share, dtype=dtype))
        assert torch.equal(batch.mixed.rest, torch.tensor(1 - share, dtype=dtype))


def test_a_store_moves_once():
    here = store()
    assert here.to("cpu") is here
    with EmulatedDevice():
        there = here.to(DEVICE)
        assert there.to(DEVICE) is there
        assert batches(replica=Replica(device=DEVICE), images=there).store is there
