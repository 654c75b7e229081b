"""Every recipe runs on a device other than the CPU: an emulated one, with the CPU's numbers and a GPU's refusals."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from aggregation.serving import load_model
from aggregation.weight_learning import Learner, WeightLearning, correct_for_prior, oracle_weights
from experts.augmentation.views import ViewMaker, Views
from experts.data.dataset import open_dataset
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.stage_setup import TrainingSetup
from orchestration.training.trainer import StageTrainer
from tests.echo import spread
from tests.emulated_device import DEVICE, EmulatedDevice, OnDevice, RefusedByDevice
from tests.emulated_graphs import emulated_graphs
from tests.recipes import AS_ON_A_GPU, PARTS, WORDS, Recipe, digits, every_recipe, export, marks, numbers
from tests.repeatable import Repeatable


@dataclass
class Ran:
    """A recipe on the emulated device: its numbers, the waits in every stage's evaluation, what a GPU would refuse."""

    numbers: list[Any]
    waits: list[Counter[tuple[str, str]]]
    refused: list[str]


@pytest.fixture(scope="module")
def on_device(request, tmp_path_factory):
    """Carry out a recipe once for the tests that ask for something of it."""
    folder = tmp_path_factory.mktemp(request.param)
    waits = []
    with EmulatedDevice() as seen, Repeatable() as repeatable:

        @contextmanager
        def watch(trainer):
            """Count waits once the images are on the device."""
            assert len(trainer.setup.scored("test")) > trainer.setup.scored_at_once
            before = seen.waits.copy()
            yield
            waits.append(seen.waits - before)

        found = numbers(request.param, folder / "run", DEVICE, watch=watch)
    return request.param, Ran(found, waits, repeatable.refused)


recipes_on_device = pytest.mark.parametrize(
    "on_device", [pytest.param(m, marks=marks(m)) for m in PARTS], indirect=True, scope="module"
)


@recipes_on_device
def test_numbers_are_the_cpus(on_device, tmp_path):
    method, ran = on_device
    expected = numbers(method, tmp_path / "cpu", "cpu", AS_ON_A_GPU)
    assert str(ran.numbers) == str(expected)  # text, since NaN is not itself


@recipes_on_device
def test_an_evaluation_has_at_most_two_waits(on_device):
    _, ran = on_device
    assert ran.waits
    assert all(waits.total() <= 2 for waits in ran.waits), ran.waits


@recipes_on_device
def test_no_recipe_needs_an_operation_that_cannot_be_repeated(on_device):
    """With engine.deterministic a GPU refuses it."""
    _, ran = on_device
    assert ran.refused == []


@every_recipe
def test_all_that_workers_exchange_lies_on_the_device(method, tmp_path):
    crossed = []
    mesh = partial(spread, crossed)
    with EmulatedDevice():
        for trainer in Recipe(method, tmp_path, mesh=mesh).trainers():
            if trainer.training is not None:
                trainer.train(1)
            trainer.evaluate("test")
    assert crossed


@pytest.mark.parametrize(("backbone", "most"), [("resnet8", 500), ("resnet32", 900)])
def test_launches_of_a_step(backbone, most):
    """Three experts on ResNet-32 have 71 convolutions with BatchNorm and ReLU: six launches each, forward and back."""
    config = load_config(["method=ride", f"backbone={backbone}", *WORDS])
    with EmulatedDevice() as seen:
        assert launches_of_a_step(config, seen) <= most
    with EmulatedDevice() as seen, emulated_graphs():  # a graph, places of the batch, the optimiser
        assert launches_of_a_step(config, seen) <= 50


def launches_of_a_step(config, seen):
    """Return the launches of the fourth step."""
    trainer = StageTrainer(config, "train", digits(0), Mesh(mesh_shape(3, 1), device=DEVICE))
    trainer.train(3)
    before = seen.launches.total()
    trainer.train(4)
    return seen.launches.total() - before


def on_both(work):
    """Return what `work(device)` gives on the CPU and on the emulated device."""
    on_cpu = work("cpu")
    with EmulatedDevice():
        return on_cpu, work(DEVICE)


@pytest.mark.parametrize(
    "words",
    [
        ["dataset.augment.random_resized_crop=[0.2,1.0]", "dataset.augment.crop_padding=0"],
        ["dataset.augment.name=randaugment", "method.stages.train.views=[moco,autoaugment_cutout]"],
    ],
    ids=["cropped", "several views"],
)
def test_resident_images_are_augmented(words):
    config = load_config(["method=ride", *WORDS, AS_ON_A_GPU, *words])

    def losses(device):
        trainer = StageTrainer(config, "train", open_dataset(config.dataset), Mesh(mesh_shape(3, 1), device=device))
        return trainer.train(2).losses

    on_cpu, on_device = on_both(losses)
    assert on_cpu == on_device


def test_both_streams_of_a_stage_take_their_images_from_one_copy():
    config = load_config(["method=bbn", *WORDS])
    with EmulatedDevice():
        setup = TrainingSetup(config, "train", digits(0), Mesh(mesh_shape(2, 1), device=DEVICE))
        images, partners = setup.batches.store.images, setup.partners.store.images
        assert isinstance(images, OnDevice)
        assert images.inner.data_ptr() == partners.inner.data_ptr()


@pytest.mark.parametrize("views", [Views(), Views(random_resized_crop=(0.2, 1.0), crop_padding=0)])
def test_views_of_test_images(views):
    config = load_config(WORDS).dataset
    test = digits(0).test

    def made(device):
        maker = ViewMaker(test.to(device), config, views, seed=1, device=device)
        return maker.make(np.arange(40), 1, 0).cpu()

    on_cpu, on_device = on_both(made)
    assert torch.equal(on_cpu, on_device)


def test_a_served_model_resizes_what_it_is_given(tmp_path):
    config = load_config(["method=ace", *WORDS])
    dataset = digits(0)
    export(tmp_path / "m", config, "train", dataset, image_shape=None)
    images = np.random.default_rng(0).integers(0, 256, (3, 21, 30, 1), dtype=np.uint8)
    on_cpu, on_device = on_both(lambda device: load_model(tmp_path / "m", device).predict(images))
    np.testing.assert_allclose(on_device, on_cpu, rtol=1e-5)  # not bitwise: their weights lie in another order


def test_weights_are_learnt_and_compared():
    draws = torch.Generator().manual_seed(0)
    logits_2ENC, labels_N = torch.randn(2, 3, 60, 10, generator=draws), torch.arange(60) % 10

    def work(device):
        logits = logits_2ENC.to(device)
        learner = Learner(3, WeightLearning(), device)
        learner.step(logits)
        corrected = correct_for_prior(logits[0], np.full(10, 0.1), np.zeros((3, 10)))
        return learner.weights_E.tolist(), oracle_weights(logits[0], labels_N), corrected.tolist()

    on_cpu, on_device = on_both(work)
    assert on_cpu == on_device


class TestTheDeviceItself:
    """It refuses what a GPU refuses, and counts what makes the host wait."""

    def test_tensors_of_both_kinds_are_refused(self):
        with EmulatedDevice(), pytest.raises(RefusedByDevice, match="of the device and of the host"):
            torch.ones(3, device=DEVICE) + torch.ones(3)

    def test_a_number_may_come_from_the_host(self):
        with EmulatedDevice():
            assert (torch.ones(3, device=DEVICE) * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]

    def test_numpy_needs_the_cpu_first(self):
        with EmulatedDevice(), pytest.raises(RefusedByDevice, match=r"needed \.cpu\(\) first"):
            torch.ones(3, device=DEVICE).numpy()

    def test_uint8_images_cannot_be_resized(self):
        images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        with EmulatedDevice(), pytest.raises(RefusedByDevice, match="no CUDA kernel"):
            interpolate(images.to(DEVICE), (4, 4), mode="bilinear", antialias=True)

    def test_waits_are_counted_by_line(self):
        with EmulatedDevice() as seen:
            values = torch.ones(3, device=DEVICE)
            assert not seen.waits
            values[0].item()
            values.cpu()
            values[values > 0]
        assert sorted(kind for kind, _ in seen.waits) == ["item", "size from values", "to the host"]
        assert all(line.startswith(__file__) for _, line in seen.waits)
