"""The host waits for the device as seldom as promised, in every recipe; counted on an emulated device."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from aggregation.serving import load_model
from aggregation.weight_learning import Learner, WeightLearning
from experts.data.images import ResidentImages
from orchestration.config.compose import load_config
from orchestration.results import label_shift
from orchestration.results.saved_run import SavedRun
from orchestration.training import fitting
from orchestration.training.mesh import Mesh, mesh_shape
from tests.echo import spread
from tests.emulated_device import DEVICE, EmulatedDevice
from tests.recipes import WORDS, Recipe, digits, export


def packed(config):
    return Mesh(mesh_shape(config.method.num_experts, 1), device=DEVICE)


class TestEvaluation:
    """Its waits do not grow with its batches. test_devices.py counts them in every recipe."""

    @pytest.mark.parametrize("method", ["ride", "ace", "ride_router"])
    def test_has_so_on_workers_that_hold_one_expert_of_two_replicas(self, method, tmp_path):
        with EmulatedDevice():
            for trainer in Recipe(method, tmp_path, mesh=partial(spread, [])).trainers():
                trainer.setup.scored("test")
                with EmulatedDevice() as seen:
                    trainer.evaluate("test")
                assert seen.waits.total() <= 2, seen.waits

    @pytest.mark.parametrize("method", ["tau_norm", "ncm"])
    def test_fitting_reads_once_per_number_and_head(self, method, tmp_path):
        """One wait for all candidates of a number; one for each head that is fitted, and to move the images."""
        with EmulatedDevice():
            for trainer in Recipe(method, tmp_path, "dataset.val_per_class=30", mesh=packed).trainers():
                if trainer.training is None:
                    with EmulatedDevice() as seen:
                        fitting.fit(trainer.setup, lambda: None)
                    assert seen.waits.total() <= 2, seen.waits

    @pytest.mark.parametrize("method", ["ride", "ace", "logit_adjustment"])
    def test_a_served_model_waits_once_per_call(self, method, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
        export(tmp_path / "m", load_config([f"method={method}", *WORDS]), "train", digits(0))
        with EmulatedDevice():
            model = load_model(tmp_path / "m", DEVICE)
            with EmulatedDevice() as seen:
                model.predict(images, batch_size=16)
            assert seen.waits.total() == 1, seen.waits

    def test_weights_are_read_once_per_pass(self):
        views_2EBC = torch.randn(2, 3, 20, 10)
        with EmulatedDevice():
            learner = Learner(3, WeightLearning(), DEVICE)
            views_2EBC = views_2EBC.to(DEVICE)
            with EmulatedDevice() as seen:
                for _ in range(5):
                    learner.step(views_2EBC)
                assert not seen.waits
                learner.end_pass()
            assert seen.waits.total() == 1, seen.waits

    @pytest.mark.parametrize("method", ["ride", "ace"])
    def test_with_test_time_weights_waits_as_often_in_small_batches_as_in_large_ones(self, method, tmp_path):
        export(tmp_path / "m", load_config([f"method={method}", *WORDS]), "train", digits(0))
        with EmulatedDevice():
            few, many = (waits_of_test_time_weights(method, tmp_path, size) for size in (1000, 60))
        assert few and many == few


def waits_of_test_time_weights(method, folder, batch_size):
    """Return how often the host waits while weights are learnt and compared in batches of this size."""
    config = load_config([f"method={method}", *WORDS, f"run.evaluation_batch_size={batch_size}"])
    whole = digits(0)
    dataset = replace(whole, test=ResidentImages(whole.test.images[:150], whole.test.labels[:150]))
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "best.json").write_text(json.dumps({"stage": "train"}))
    saved = SavedRun(
        folder, config, {"counts": dataset.counts_C.tolist()}, "best", "", load_model(folder / "m", DEVICE), "test",
        dataset.test.to(DEVICE), dataset, torch.device(DEVICE), torch.float32,
    )  # fmt: skip
    learning = {"epochs": 2, "stop_below": 0.0, "batch_size": batch_size}
    request = label_shift.Request("test-time", None, ("uniform", "backward-2"), learning, {}, {}, [])
    with EmulatedDevice() as seen, torch.no_grad():
        label_shift._measure(saved, request)
    return seen.waits
