"""Every recipe runs on a device other than the CPU: an emulated one, with the CPU's numbers and a GPU's refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from aggregation.metrics import Scores
from aggregation.serving import TrainingData, export_model, load_model
from aggregation.weight_learning import Learner, WeightLearning, correct_for_prior, oracle_weights
from experts.augmentation.views import ViewMaker, Views
from experts.data.dataset import open_dataset
from experts.ensemble import build_ensemble
from orchestration.config.compose import available, load_config
from orchestration.training.exchange import Groups
from orchestration.training.mesh import Mesh, MeshShape, mesh_shape
from orchestration.training.trainer import StageTrainer
from tests.emulated_device import DEVICE, EmulatedDevice, OnDevice, RefusedByDevice

WORDS = ["dataset=digits_lt", "dataset.image_size=8", "engine.name=torch", "tracking.enabled=false"]
QUICK = {"ride", "ace"}
"""Recipes that `make unit` tries: one whose rule asks for no numbers of the experts, one whose rule does."""
every_recipe = pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in available("method")]
)


@lru_cache
def digits(val_per_class):
    config = load_config(["method=ce", *WORDS]).dataset
    return open_dataset(config.model_copy(update={"val_per_class": val_per_class}))


def export(folder, config, stage, dataset, *, names=None, state=None, image_shape=(8, 8, 1)):
    """Write a stage's ensemble as a served folder; untrained where no state is given."""
    ensemble = config.ensemble(stage, dataset.num_classes)
    ensemble = replace(ensemble, expert_names=names or ensemble.expert_names)
    data = TrainingData(
        dataset=config.dataset,
        class_names=dataset.class_names,
        counts=dataset.counts_C.tolist(),
        image_shape=image_shape,
    )
    state = build_ensemble(ensemble, seed=1).state_dict() if state is None else state
    export_model(folder, state, ensemble, config.method.aggregator_in(stage), data)
    return str(folder)


class Recipe:
    """The stages of a recipe in one process, each from the weights that it begins with."""

    def __init__(self, method: str, folder: Path, *, mesh) -> None:
        self.config = load_config([f"method={method}", *WORDS])
        self.dataset = digits(self.config.dataset.val_per_class)
        self.folder, self.mesh = folder, mesh

    def trainers(self):
        """Yield a trainer for every stage, ready for its first step; what it holds afterwards starts later stages."""
        for stage in self.config.method.stages:
            trainer = StageTrainer(self.config, stage, self.dataset, self.mesh(self.config), self._teachers(stage))
            source = self.config.method.starts_from(stage)
            if source is not None:
                trainer.start_from(str(self.folder / source.stage))
            if trainer.training is not None:
                trainer.prepare()
            else:
                trainer.fit()
            yield trainer
            place = self.folder / stage
            place.mkdir(exist_ok=True)
            trainer.save(str(place))
            self._export(trainer, stage)
            trainer.close()

    def _export(self, trainer, stage):
        whole = build_ensemble(self.config.ensemble(stage, trainer.setup.dataset.num_classes), seed=1).state_dict()
        state = {**whole, **{name: value.cpu() for name, value in trainer.setup.model.state_dict().items()}}
        export(self.folder / f"{stage}.export", self.config, stage, trainer.setup.dataset, state=state)

    def _teachers(self, stage):
        found = {}
        for name, teacher in self.config.method.stages[stage].teachers.items():
            found[name] = str(self.folder / f"{teacher.stage}.export")
            if teacher.run is not None:  # of another run; here an untrained one, twice as large
                names = [f"teacher{i}" for i in range(2 * self.config.method.num_experts)]
                found[name] = export(self.folder / "teacher", self.config, stage, self.dataset, names=names)
        return found


def numbers(method, folder, device):
    """Return losses, terms and the test's results of every stage; saved and loaded half-way."""
    found = []
    folder.mkdir()
    recipe = Recipe(method, folder, mesh=lambda config: Mesh(mesh_shape(config.method.num_experts, 1), device=device))
    for trainer in recipe.trainers():
        if trainer.training is not None:
            first = trainer.train(1)
            half = folder / "half"
            half.mkdir(exist_ok=True)
            trainer.save(str(half))
            trainer.load(str(half), trainer.state())
            second = trainer.train(min(3, trainer.setup.steps_per_epoch))
            found += [first.losses, first.terms, second.losses, second.terms]
        scores, diversity = trainer.evaluate("test")
        result = Scores.from_state(scores).result(trainer.setup.dataset.counts_C.tolist(), None)
        found += [result["members"], {name: value.tolist() for name, value in diversity.items()}]
    return found


@every_recipe
def test_numbers_are_the_cpus(method, tmp_path):
    expected = numbers(method, tmp_path / "cpu", "cpu")
    with EmulatedDevice():
        assert str(numbers(method, tmp_path / "device", DEVICE)) == str(expected)  # text, since NaN is not itself


class Echo:
    """A group whose other workers hold what this one holds. It takes nothing from the CPU, as NCCL does not."""

    handle = None

    def __init__(self, size, rank, crossed):
        self.size, self.rank, self._crossed = size, rank, crossed

    def all_gather(self, own, what):
        return [self._look(own, what).detach()] * self.size

    def all_reduce(self, values, what):
        self._look(values, what).mul_(self.size)

    def broadcast(self, values, what):
        self._look(values, what)

    def _look(self, values, what):
        assert isinstance(values, OnDevice), f"{what}: on the CPU"
        self._crossed.append(what)
        return values


@every_recipe
def test_all_that_workers_exchange_lies_on_the_device(method, tmp_path):
    """One expert per worker, two replicas."""
    crossed = []

    def mesh(config):
        experts = config.method.num_experts
        groups = Groups(Echo(2, 0, crossed), Echo(experts, 0, crossed), Echo(2 * experts, 0, crossed))
        return Mesh(MeshShape(experts, 1, 2), device=DEVICE, groups=groups)

    with EmulatedDevice():
        for trainer in Recipe(method, tmp_path, mesh=mesh).trainers():
            if trainer.training is not None:
                trainer.train(1)
            trainer.evaluate("test")
    assert crossed


def on_both(work):
    """Return what `work(device)` gives on the CPU and on the emulated device."""
    on_cpu = work("cpu")
    with EmulatedDevice():
        return on_cpu, work(DEVICE)


def test_resident_images_are_cropped_at_random():
    words = ["dataset.augment.random_resized_crop=[0.2,1.0]", "dataset.augment.crop_padding=0"]
    config = load_config(["method=ride", *WORDS, *words])

    def losses(device):
        trainer = StageTrainer(config, "train", open_dataset(config.dataset), Mesh(mesh_shape(3, 1), device=device))
        return trainer.train(2).losses

    on_cpu, on_device = on_both(losses)
    assert on_cpu == on_device


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
    images = np.random.default_rng(0).integers(0, 256, (3, 21, 30), dtype=np.uint8)
    on_cpu, on_device = on_both(lambda device: load_model(tmp_path / "m", device).predict(images))
    assert np.array_equal(on_cpu, on_device)


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
