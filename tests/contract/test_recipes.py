"""Every recipe with every schedule it has: what it says fits together, and on digits each of its stages trains.

A recipe is configs/method/<method>.yaml with configs/schedule/<method>_<dataset>.yaml, or with the demo's own schedule.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from aggregation.metrics import Scores
from aggregation.serving import TrainingData, export_model
from experts import ensemble as ensembles
from experts.data.dataset import open_dataset
from experts.ensemble import build_ensemble, part_of
from experts.progress import Progress
from experts.registry import build
from orchestration.config.compose import available, load_config
from orchestration.config.identity import published
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer


def pair_of(schedule):
    """Return method and dataset of a schedule, e.g. ride_h2t and cifar10_lt."""
    method = max((name for name in available("method") if schedule.startswith(f"{name}_")), key=len)
    return method, schedule.removeprefix(f"{method}_").removesuffix("_demo")


@lru_cache
def composed(schedule):
    method, dataset = pair_of(schedule)
    chosen = [f"schedule={schedule}"] if schedule.endswith("_demo") else []  # else it is found by the pair
    return load_config([f"method={method}", f"dataset={dataset}", *chosen])


every_schedule = pytest.mark.parametrize("schedule", available("schedule"))


@pytest.mark.slow
@every_schedule
def test_every_schedule_composes(schedule):
    method, dataset = pair_of(schedule)
    assert dataset in available("dataset")
    config = composed(schedule)
    assert (config.method.name, config.dataset.name) == (method, dataset)


def test_a_schedule_that_is_named_is_the_one_that_is_found():
    words = ["method=ride_h2t", "dataset=cifar10_lt"]
    assert load_config([*words, "schedule=ride_h2t_cifar10_lt"]) == composed("ride_h2t_cifar10_lt")


def test_every_method_has_a_schedule_for_digits():
    assert [m for m in available("method") if f"{m}_digits_lt" not in available("schedule")] == []


@every_schedule
@pytest.mark.slow
def test_a_schedule_meets_the_conditions_of_the_number_it_quotes(schedule):
    config = composed(schedule)
    assert (published(config) is None) == (config.method.expected is None)


@every_schedule
def test_nothing_is_planned_for_after_the_end(schedule):
    for stage in composed(schedule).method.stages.values():
        schedule = build("lr_schedule", stage.lr_schedule)
        factors = [schedule.factor(Progress(n, stage.epochs, 0, 1)) for n in range(1, stage.epochs + 1)]
        assert all(0 <= factor <= 1 for factor in factors)
        assert all(epoch < stage.epochs for epoch in (*stage.lr_schedule.drops, *stage.objective.switches.values()))


PUBLISHED_PARAMETERS = {
    "ride_imagenet_lt": 42_889_024,
    "ride_inat18": 76_587_584,
    "tade_imagenet_lt": 42_889_024,
    "tade_inat18": 76_587_584,
    "tade_places_lt": 171_543_616,
    "reslt_imagenet_lt": 37_624_104,
    "bbn_inat18": 19_045_440 + 2 * 4_462_592 + 8142 * 4096 + 8142,
    # ResLT's ResNet-10 without its branches and head, the extra layer and LFME's head.
    "lfme_imagenet_lt": 6_208_296 - 789_504 - 513_000 + 512 * 513 + 1000 * 513,
}


@pytest.mark.parametrize("schedule", PUBLISHED_PARAMETERS)
@pytest.mark.slow
def test_big_ensembles_have_the_published_number_of_parameters(schedule, monkeypatch):
    @contextmanager
    def without_memory(*_):
        with torch.device("meta"):
            yield

    monkeypatch.setattr(ensembles, "keyed_draws", without_memory)
    config = composed(schedule)
    model = whole(config, config.method.final, config.dataset.num_classes)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[schedule]


def test_tade_on_places_learns_heads_at_a_hundredth_and_the_rest_at_a_thousandth():
    stage = composed("tade_places_lt").method.stages["train"]
    rates = {part: stage.optimizer.lr * factor for part, factor in stage.lr_factors.model_dump().items()}
    assert rates == {"trunk": 0.001, "features": 0.001, "heads": 0.01, "calibration": 0.01}


def whole(config, stage, num_classes, names=None):
    """Build the ensemble of a stage, untrained."""
    ensemble = config.ensemble(stage, num_classes)
    return build_ensemble(replace(ensemble, expert_names=names or ensemble.expert_names), seed=1)


def export(folder, config, stage, dataset, model):
    """Write the folder of a served model, as a finished stage or run does."""
    data = TrainingData(
        dataset=config.dataset,
        class_names=dataset.class_names,
        counts=dataset.counts_C.tolist(),
        image_shape=dataset.raw_image_shape,
    )
    ensemble = replace(config.ensemble(stage, dataset.num_classes), expert_names=model.names)
    export_model(folder, model.state_dict(), ensemble, config.method.aggregator_in(stage), data)
    return str(folder)


@lru_cache
def digits(val_per_class):
    config = load_config(["method=lfme", "dataset=digits_lt", "dataset.image_size=16"]).dataset
    return open_dataset(config.model_copy(update={"val_per_class": val_per_class}))


class TestOnDigits:
    """Each stage of each recipe, in one process with the plain engine: two steps from the weights it begins with."""

    @pytest.mark.parametrize("method", available("method"))
    @pytest.mark.slow
    def test_two_steps_move_what_learns_and_nothing_else(self, method, tmp_path):
        words = ["dataset=digits_lt", "dataset.image_size=16", "engine.name=torch", "tracking.enabled=false"]
        config = load_config([f"method={method}", *words])
        dataset = digits(config.dataset.val_per_class)
        mesh = Mesh(mesh_shape(config.method.num_experts, 1))
        for stage, settings in config.method.stages.items():
            teachers = {}
            for name, teacher in settings.teachers.items():
                teachers[name] = str(tmp_path / f"{teacher.stage}.export")
                if teacher.run is not None:  # of another run; here an untrained one of the same make, twice as large
                    names = [f"teacher{i}" for i in range(2 * config.method.num_experts)]
                    model = whole(config, stage, dataset.num_classes, names)
                    teachers[name] = export(tmp_path / "teacher", config, stage, dataset, model)
            trainer = StageTrainer(config, stage, dataset, mesh, teachers)
            source = config.method.starts_from(stage)
            if source is not None:
                trainer.start_from(str(tmp_path / source.stage))
            self.check_two_steps(trainer)
            (tmp_path / stage).mkdir()
            trainer.save(str(tmp_path / stage))
            export(tmp_path / f"{stage}.export", config, stage, trainer.setup.dataset, trainer.setup.model)
            trainer.close()

    def check_two_steps(self, trainer):
        before = {name: value.clone() for name, value in trainer.setup.model.state_dict().items()}
        trainer.prepare()
        # In the second epoch: in the first, BBN's second branch has the weight 0.
        trainer.done = trainer.setup.steps_per_epoch
        found = trainer.train(trainer.done + 2)
        assert len(found.losses) == 2
        assert all(map(math.isfinite, [*found.losses, *found.terms.values()]))

        stage, learning = trainer.setup.stage, trainer.setup.learns
        parameters = dict(trainer.setup.model.named_parameters())
        assert {part_of(name) for name in parameters} >= learning - {"trunk"}  # LFME has no trunk
        for name, value in trainer.setup.model.state_dict().items():
            moves = part_of(name) in learning
            if name not in parameters:  # BatchNorm's statistics
                moves = moves or stage.frozen_batchnorm == "train"
            assert torch.equal(value, before[name]) != moves, name
        assert trainer.training.engine.momentum().keys() == {name for name in parameters if part_of(name) in learning}

        state, _ = trainer.evaluate("test")
        members = Scores.from_state(state).result(trainer.setup.dataset.counts_C.tolist(), None)["members"]
        assert set(trainer.setup.expert_names) < set(members)
        assert all(np.isfinite(member["nll"]) for member in members.values())
