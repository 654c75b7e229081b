"""Only a GPU shows this: its kernels give the CPU's numbers, NCCL takes what workers exchange, float32 is float32."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import interpolate

from aggregation.serving import load_model
from experts import side_by_side
from experts.augmentation.resized_crop import random_resized_crops
from experts.augmentation.stack import Stack
from experts.augmentation.views import ViewMaker, Views
from experts.batches import Batch
from experts.cases import cases_of
from experts.data.dataset import open_dataset
from experts.data.decode import CROP_UNIFORMS
from experts.data.keyed_random import key, uniforms
from experts.data.resampling import resample
from experts.draws import StepDraws
from experts.precision import repeat_bits
from experts.progress import Progress
from experts.registry import registered_names
from orchestration.config.compose import load_config
from orchestration.training.batchnorm import SynchronisedBatchNorm2d
from orchestration.training.exchange import CutGroup, TorchGroup
from orchestration.training.graphs import StepGraphs, graph_backend
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer
from orchestration.training.world import Rendezvous, leave_world
from tests.recipes import WORDS, Recipe, digits, every_recipe, export, numbers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def flat(found):
    """Return all numbers in nested lists and mappings, in order; None and text left out."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        return [number for item in found for number in flat(item)]
    return [float(found)] if isinstance(found, (int, float)) else []


@every_recipe
def test_numbers_are_the_cpus_in_float64(method, tmp_path):
    """Losses, terms and the test's results of every stage, saved and loaded half-way."""
    words = "engine.precision=float64"
    on_cpu, on_gpu = (flat(numbers(method, tmp_path / d, d, words)) for d in ("cpu", "cuda"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-9, abs=1e-9, nan_ok=True)


def trainer_of(*words):
    config = load_config(["method=ride", *WORDS, "cluster.gpus_per_worker=1", *words])
    return StageTrainer(config, "train", open_dataset(config.dataset), Mesh(mesh_shape(3, 1), device="cuda"))


# Steps


@every_recipe
def test_graphs_and_streams_give_the_numbers_of_single_kernels(method, tmp_path, monkeypatch):
    """Experts on streams of their own in captured steps, against one kernel after the other; switched in mid-stage."""
    found = []
    for name in ("auto", "false"):
        with monkeypatch.context() as patches:
            if name == "false":
                patches.setattr(side_by_side, "_exchanges", lambda expert: True)  # and so in turn, on one stream
            (tmp_path / name).mkdir()
            words = ("engine.precision=float64", f"engine.graphs={name}")
            found.append([])
            for trainer in Recipe(method, tmp_path / name, *words, mesh=packed).trainers():
                if trainer.training is None:
                    continue
                for item in steps_of(trainer):
                    found[-1] += flat(item)
                capturable = all(piece.capturable for piece in trainer._step._pieces)
                assert bool(trainer._step._graphs._replays) == (name == "auto" and capturable)
    assert found[0] == pytest.approx(found[1], rel=1e-9, abs=1e-9, nan_ok=True)


def packed(config):
    return Mesh(mesh_shape(config.method.num_experts, 1), device="cuda")


def steps_of(trainer):
    """Yield losses and terms of three epochs of a stage, at most, with checkpoint-like reads of the weights between."""
    per_epoch = trainer.setup.steps_per_epoch
    for epoch in range(min(3, trainer.setup.stage.epochs)):
        interval = trainer.train(per_epoch * (epoch + 1))
        assert not interval.notes
        yield interval.losses
        yield interval.terms
    yield [float(value.double().norm()) for value in trainer.setup.model.state_dict().values()]


def test_experts_on_streams_wait_for_what_they_read():
    """Long work before the fork and after the join, so that a missing wait would read what is not there yet."""
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).cuda().double() for _ in range(3)]
    trunk = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(20)]).cuda().double()
    weights = [*trunk.parameters(), *(p for expert in experts for p in expert.parameters())]

    def gradients(of):
        x = torch.linspace(-1, 1, 16 * 8 * 32 * 32, device="cuda", dtype=torch.float64).view(16, 8, 32, 32)
        for _ in range(5):  # the allocator hands out memory again
            h = trunk(x)
            loss = torch.stack(of(h)).square().mean()
            found = torch.autograd.grad(loss, weights)
        return torch.cat([g.flatten() for g in found])

    streams = gradients(lambda h: side_by_side.side_by_side(lambda expert: expert(h), experts))
    loop = gradients(lambda h: [expert(h) for expert in experts])
    assert torch.allclose(streams, loop, rtol=1e-9, atol=1e-12)


class TestGraphs:
    """The toy steps of the tests on the emulated device, on CUDA."""

    def test_a_capture_is_cut_in_both_directions(self, world):
        """Synchronised BatchNorm over a group of one, which exchanges all the same."""
        group = CutGroup(TorchGroup(dist.group.WORLD))
        found = []
        for backend in (graph_backend(torch.device("cuda", 0)), None):
            torch.manual_seed(0)
            network = (
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3)).cuda().double()
            )
            network[1].__class__ = SynchronisedBatchNorm2d
            network[1].group, network[1].of_whom = group, ""
            found.append(self.steps(network, backend))
        assert torch.allclose(*found, rtol=1e-9, atol=1e-12)

    def steps(self, network, backend):
        def compute(batch, now):
            loss = network(batch.images_B3HW).square().mean()
            return loss, *torch.autograd.grad(loss, list(network.parameters()))

        reports = []
        steps = StepGraphs(compute, StepDraws(lambda *_: 0, "cuda"), backend, reports.append)
        found = []
        for step in range(6):
            found += [value.clone().flatten() for value in steps(self.batch(step), Progress(1, 1, step, 9))]
        assert not reports
        assert bool(steps._replays) == (backend is not None)
        return torch.cat([*found, network[1].running_mean, network[1].running_var])

    def batch(self, step):
        images = torch.linspace(-1 - step, 1, 8 * 3 * 16 * 16, device="cuda", dtype=torch.float64).view(8, 3, 16, 16)
        labels = torch.arange(8, device="cuda")
        return Batch(images, labels, labels)

    def test_a_step_that_waits_goes_on_without_graphs(self):
        """And so do others after it: the allocator has left the pool of the capture that failed."""
        reports = []
        wait = [True]

        def compute(batch, now):
            x = torch.stack([batch.images_B3HW] * 4).square()
            return x * float(x.mean()) if wait[0] else x * 2

        steps = StepGraphs(
            compute, StepDraws(lambda *_: 0, "cuda"), graph_backend(torch.device("cuda", 0)), reports.append
        )
        for step in range(5):
            batch = self.batch(step)
            x = batch.images_B3HW.square()
            assert torch.allclose(steps(batch, Progress(1, 1, step, 9))[0], x * x.mean())
        assert len(reports) == 1
        wait[0] = False
        for step in range(5):
            batch = self.batch(step)
            found = steps(batch, Progress(1, 1, step, 9), "another key")
            assert torch.equal(found[0], batch.images_B3HW.square() * 2)
        assert len(steps._replays) == 1


# Images


@pytest.mark.parametrize(("size", "new"), [(32, 224), (500, 224), (8, 32), (257, 256), (33, 7)])
def test_images_are_resized_to_the_pixel(size, new):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, size, size), dtype=np.uint8))
    found = resample(images.cuda(), np.array([[0, 0, size, size]]), new, new)
    assert torch.equal(found.cpu(), interpolate(images, (new, new), mode="bilinear", antialias=True))


def test_resident_images_are_cropped_to_the_pixel():
    draws = np.random.default_rng(0)
    images = torch.from_numpy(draws.integers(0, 256, (64, 3, 32, 32), dtype=np.uint8))
    drawn = draws.random((64, CROP_UNIFORMS))
    on_gpu = random_resized_crops(images.cuda(), drawn, (0.08, 1.0))
    assert torch.equal(on_gpu.cpu(), random_resized_crops(images, drawn, (0.08, 1.0)))


@pytest.mark.parametrize("name", registered_names("augmentation"))
def test_augmentations_give_the_cpus_pixels(name):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8))
    for case in cases_of("augmentation", name):
        stack = Stack([case.config], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        draws = stack.draw(lambda table, width: uniforms(key(0, table), 0, 64, width))
        on_cpu, on_gpu = (stack(images.to(device), draws, torch.float64) for device in ("cpu", "cuda"))
        assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-9)


@pytest.mark.parametrize("views", [Views(), Views(random_resized_crop=(0.2, 1.0), crop_padding=0)])
def test_views_of_test_images(views):
    config, test = load_config(WORDS).dataset, digits(0).test
    made = [
        ViewMaker(test.to(device), config, views, seed=1, device=device, dtype=torch.float64).make(np.arange(40), 1, 0)
        for device in ("cpu", "cuda")
    ]
    assert torch.allclose(made[1].cpu(), made[0], atol=1e-9)


def test_a_served_model_resizes_what_it_is_given(tmp_path):
    export(tmp_path / "m", load_config(["method=ace", *WORDS]), "train", digits(0), image_shape=None)
    images = np.random.default_rng(0).integers(0, 256, (3, 21, 30, 1), dtype=np.uint8)
    on_cpu, on_gpu = (load_model(tmp_path / "m", device).predict(images) for device in ("cpu", "cuda"))
    assert np.allclose(on_gpu, on_cpu, atol=1e-5)


# Exchanges


@pytest.fixture
def world():
    """Join a world of one GPU."""
    Rendezvous("127.0.0.1", 1, host_here=True).join(0, 1, gpu=True, timeout_s=60)
    yield
    leave_world()


@pytest.mark.parametrize("numbers_of_an_expert", [0, 7])
def test_nccl_gathers_what_experts_are_described_by(numbers_of_an_expert, world):
    own = torch.ones(3, numbers_of_an_expert, device="cuda")
    (found,) = TorchGroup(dist.group.WORLD).all_gather(own, "numbers of the experts")
    assert torch.equal(found, own)


def test_what_nccl_refuses_is_not_a_lost_worker(world):
    with pytest.raises(RuntimeError, match="device type cpu") as caught:
        TorchGroup(dist.group.WORLD).all_reduce(torch.ones(3), "a tensor of the CPU")
    ray = pytest.importorskip("ray")  # a GPU may be tried without it
    from orchestration.cluster.failures import broken_exchange

    trace = f"torch/distributed/distributed_c10d.py\n{caught.value}"
    assert broken_exchange(ray.exceptions.RayTaskError("evaluate", trace, caught.value)) is None


@pytest.mark.skipif(os.environ.get("DS_ACCELERATOR") != "cuda", reason="needs DS_ACCELERATOR=cuda before any import")
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_trains_and_evaluates_as_the_plain_engine(stage, world, tmp_path):
    found = []
    for engine in ("torch", "deepspeed"):
        words = [f"engine.name={engine}", f"engine.zero_stage={stage}", "engine.precision=float64"]
        trainer = trainer_of(*words)
        first = trainer.train(2).losses
        (tmp_path / engine).mkdir()
        trainer.save(str(tmp_path / engine))
        trainer.load(str(tmp_path / engine), trainer.state())
        scores, _ = trainer.evaluate("test")
        rest = trainer.train(trainer.setup.steps_per_epoch).losses  # most of them replays of graphs
        found.append([*first, *rest, *flat({k: v.tolist() for k, v in scores.items()})])
        trainer.close()
    assert found[1] == pytest.approx(found[0], rel=1e-9)


# Precision


def gradient(precision):
    """Return the gradient of the first batch and the first weights, float64: a first step's momentum."""
    trainer = trainer_of("dataset.image_size=32", "backbone=resnet32", f"engine.precision={precision}")
    trainer.train(1)
    parts = [value.double().flatten() for value in trainer.training.engine.momentum().values()]
    trainer.close()
    return torch.cat(parts)


def test_float32_is_not_tf32():
    exact = gradient("float64")
    error = {p: float((gradient(p) - exact).norm() / exact.norm()) for p in ("float32", "tf32")}
    assert 5 * error["float32"] < error["tf32"], error


def test_deterministic_steps_repeat_their_bits():
    def epoch():
        trainer = trainer_of("engine.deterministic=true", "engine.precision=autocast")
        losses = trainer.train(trainer.setup.steps_per_epoch).losses
        weights = [value.cpu() for value in trainer.setup.model.state_dict().values()]
        trainer.close()
        return losses, weights

    try:
        (losses, weights), (again, same) = epoch(), epoch()
        assert losses == again
        assert all(torch.equal(one, other) for one, other in zip(weights, same, strict=True))
    finally:
        repeat_bits(False)


@pytest.mark.parametrize(("precision", "last"), [("float32", False), ("tf32", True), ("autocast", True)])
def test_channels_lie_side_by_side_all_the_way_where_it_rounds(precision, last):
    trainer, found = trainer_of(f"engine.precision={precision}"), []
    for module in trainer.setup.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, out: found.append(out))
    trainer.train(1)
    trainer.close()
    assert found
    assert {out.is_contiguous(memory_format=torch.channels_last) for out in found} == {last}


@pytest.mark.filterwarnings("ignore")  # torch's compiler raises some itself, and hides them
def test_compiled_steps_agree():
    losses = {}
    for compiled in ("true", "false"):
        trainer = trainer_of("engine.precision=float64", f"engine.compile={compiled}")
        losses[compiled] = trainer.train(5).losses
        trainer.close()
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-6)
