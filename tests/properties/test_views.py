"""Further views of a row are other changes of the same image, on every placement, ahead and step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import experts.data.images
from experts.augmentation.stack import Stack
from experts.batches import AHEAD_BYTES, Replica, StreamConfig, TrainBatches
from experts.data.config import Augment, DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.images import ResidentImages
from experts.data.keyed_random import key, uniforms
from experts.samplers.instance_balanced import InstanceBalanced
from orchestration.config.compose import load_config
from orchestration.config.words import available
from tests.emulated_device import DEVICE, EmulatedDevice, OnDevice

SIZE, IMAGES, BATCH = 12, 21, 5
FIRST = Augment(crop_padding=2, horizontal_flip=0.5)
STRONG = Augment.model_validate(
    [
        {"name": "resized_crop", "scale": [0.3, 1.0]},
        {"name": "flip"},
        {"name": "color_jitter", "hue": 0.1, "probability": 0.8},
        {"name": "greyscale"},
        {"name": "gaussian_blur", "sigma": [0.1, 1.0]},
    ]
)
VIEWS = (FIRST, STRONG, Augment(rotation=15))
SETTINGS = {"name": "made up", "source": "cifar10", "image_size": SIZE, "augment": FIRST, "mean": (0.5, 0.4, 0.3)}


def resident():
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=np.uint8)
    return ResidentImages(torch.from_numpy(pixels), draws.permutation(IMAGES) % 3)


WHOLE = Replica()


def batches(replica=WHOLE, views=VIEWS, store=None, config=None):
    store = store or resident()
    sampler = InstanceBalanced(InstanceBalanced.Config(), store.labels, 3)
    stream = StreamConfig(seed=1, stage="s", stream="m", epochs=2, batch_size=BATCH)
    return TrainBatches(store, sampler, config or DatasetConfig(**SETTINGS), stream, replica, views=views)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(6):
            folder = root / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draws.integers(0, 256, (20 + number, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def same(one, other):
    return len(one.views) == len(other.views) and all(
        torch.equal(a.inner if isinstance(a, OnDevice) else a, b)
        for a, b in zip((one.images_B3HW, *one.views), (other.images_B3HW, *other.views), strict=True)
    )


def test_the_first_view_is_what_a_stage_without_others_has():
    for batch, alone in zip(batches().iterate(1), batches(views=()).iterate(1), strict=True):
        assert alone.views == ()
        assert torch.equal(batch.images_B3HW, alone.images_B3HW)


def test_a_view_is_a_stack_of_its_own_with_draws_of_its_own():
    """View v of row i is drawn from row i of the tables `<table>/v`."""
    loader, store = batches(), resident()
    batch, rows = loader.batch(2, 1), slice(BATCH, 2 * BATCH)
    images = store.images[loader.positions(2)[rows]]
    for number, augment in enumerate((FIRST, *VIEWS)):
        stack = Stack.of(DatasetConfig(**SETTINGS), augment)
        draws = stack.draw(
            lambda table, width, v=number: uniforms(key(1, "s", 2, "m", f"{table}/{v}"), BATCH, BATCH, width)
        )
        assert torch.equal((batch.images_B3HW, *batch.views)[number], stack(images, draws))
    assert not torch.equal(batch.images_B3HW, batch.views[0]), "the same stack, other draws"


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_views_made_ahead_are_those_of_single_steps_on_every_replica(replicas):
    """Three replicas share a last batch of one image."""
    whole = batches()
    parts = [batches(Replica(index, replicas)) for index in range(replicas)]
    for part in parts:
        part.steps_ahead = 3
    for step, shares in enumerate(zip(*(part.iterate(2) for part in parts), strict=True)):
        batch = whole.batch(2, step)
        for number, view in enumerate(batch.views):
            assert torch.equal(torch.cat([share.views[number] for share in shares]), view)


@pytest.mark.parametrize("name", available("augment"))
def test_every_named_augmentation_is_the_same_on_every_replica(name):
    """Whatever the recipe: its experts share a replica's images, wherever they live."""
    augment = load_config([f"dataset.augment.name={name}"]).dataset.augment
    config = DatasetConfig(**SETTINGS | {"augment": augment})
    whole = list(batches(views=(), config=config).iterate(2))
    for replicas in (2, 3):
        parts = [batches(Replica(index, replicas), (), config=config).iterate(2) for index in range(replicas)]
        for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat([share.images_B3HW for share in shares]), batch.images_B3HW)


def test_a_device_gets_the_same_views_without_a_wait_or_a_launch_in_a_step():
    expected = list(batches().iterate(1))
    with EmulatedDevice() as seen:
        loader = batches(Replica(device=DEVICE))
        seen.waits.clear()
        upcoming = loader.iterate(1)
        first = next(upcoming)
        seen.launches.clear()
        rest = list(upcoming)
        assert not seen.waits and not seen.launches
        assert all(map(same, [first, *rest], expected))


def test_all_views_count_in_the_memory_of_steps_made_ahead():
    with EmulatedDevice():
        ahead = [batches(Replica(device=DEVICE), views=VIEWS[:number]).steps_ahead for number in (0, 1, 3)]
    assert ahead == [AHEAD_BYTES // (views * BATCH * 3 * SIZE * SIZE * 4) for views in (1, 2, 4)]


@pytest.mark.parametrize("first", [FIRST, STRONG], ids=["frames", "crops of whole pictures"])
@pytest.mark.parametrize("processes", [0, 1])
def test_a_file_is_decoded_once_for_all_its_views(tree, monkeypatch, first, processes):
    more = {"source": "image_folder", "root": str(tree), "resident": "never", "loader_processes": processes}
    config = DatasetConfig(**SETTINGS | more | {"augment": first})
    store, decoded, decode = open_dataset(config).train, [], experts.data.images.decode_file
    monkeypatch.setattr(experts.data.images, "decode_file", lambda path: decoded.append(path) or decode(path))
    loader = batches(config=config, store=store)
    found = list(loader.iterate(1))
    loader.close()
    assert processes or len(decoded) == len(set(decoded)) == 6
    for batch, step in zip(found, range(2), strict=True):
        assert same(batch, batches(config=config, store=store).batch(1, step))
        alone = [batches(config=config, store=store, views=VIEWS[:number]).batch(1, step) for number in range(3)]
        assert all(torch.equal(batch.views[n], alone[n + 1].views[n]) for n in range(2)), (
            "views do not touch each other"
        )


def test_a_replica_without_images_has_empty_views():
    loader = batches(Replica(2, 3))
    last = loader.batch(1, loader.steps_per_epoch - 1)
    assert [view.shape for view in (last.images_B3HW, *last.views)] == [(0, 3, SIZE, SIZE)] * 4
