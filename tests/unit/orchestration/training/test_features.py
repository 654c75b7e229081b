"""Stages that train heads alone: features of images that never change are computed once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from experts.data.dataset import open_dataset
from orchestration.config.compose import load_config
from orchestration.training import features as features_module
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

PLAIN = ["dataset.augment.crop_padding=0", "dataset.augment.rotation=0"]
BASE = ["method=ride", "dataset=digits_lt", "engine.precision=float64", "engine.name=torch", "dataset.image_size=16"]


def second_stage(*words):
    """RIDE's experts with a second stage that trains new heads; its trunk is left as it was built."""
    keys = {
        "epochs": "2", "batch_size": "64", "after": "[train]", "start_from.stage": "train", "reinit": "[heads]",
        "freeze": "[trunk,features]", "optimizer.lr": "0.1", "lr_schedule.name": "cosine",
        "sampler.name": "class_balanced", "objective.name": "cross_entropy",
    }  # fmt: skip
    return load_config([*BASE, *(f"method.stages.second.{key}={value}" for key, value in keys.items()), *words])


def trained(config, *, reuse=True, steps=10):
    """Take some steps of the second stage; return the trainer, the losses and how often a trunk ran."""
    trainer = StageTrainer(config, "second", open_dataset(config.dataset), Mesh(mesh_shape(3, 1)))
    if not reuse:
        trainer._features_asked = True
    runs = []
    trainer.setup.model.trunk.register_forward_hook(lambda _module, _inputs, output: runs.append(len(output)))
    losses = []
    while len(losses) < steps:
        per_epoch = trainer.setup.steps_per_epoch
        room = per_epoch - trainer.done % per_epoch
        losses += trainer.train(trainer.done + min(room, steps - len(losses))).losses
    return trainer, losses, sum(runs)


@pytest.mark.parametrize(
    "words",
    [(), ("method.stages.second.flow.name=h2t", "method.stages.second.partner_sampler.name=instance_balanced")],
    ids=["plain", "h2t"],
)
def test_the_trunk_runs_once_for_every_image_and_the_numbers_stay(words):
    config = second_stage(*PLAIN, *words)
    once, losses, images = trained(config)
    again, expected, images_again = trained(config, reuse=False)
    assert images == 405 < images_again
    assert losses == pytest.approx(expected, abs=1e-12)
    for name, tensor in again.setup.model.state_dict().items():
        assert torch.allclose(once.setup.model.state_dict()[name], tensor, rtol=0, atol=1e-12), name


@pytest.mark.parametrize(
    "word",
    [
        "dataset.augment.rotation=10",
        "method.stages.second.frozen_batchnorm=train",
        "method.stages.second.mixing.name=mixup",
        "method.stages.second.freeze=[trunk]",
        "method.stages.second.augment.name=crop_flip",
        "method.stages.second.views=[crop_flip]",
    ],
)
def test_features_that_change_are_not_kept(word):
    trainer, _, images = trained(second_stage(*PLAIN, word), steps=2)
    assert not trainer.training.features_are_fixed
    assert images == 2 * 64


def test_features_of_a_stage_without_augmentation_are_kept_whatever_the_others_have():
    trainer, _, images = trained(second_stage("method.stages.second.augment.name=none"), steps=2)
    assert trainer.training.features_are_fixed
    assert not trainer.setup.config.dataset.augment.is_off
    assert images == 405


def test_a_frozen_trunk_runs_without_a_graph():
    trainer, _, _ = trained(second_stage(), steps=1)
    seen = []
    trainer.setup.model.trunk.register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    trainer.train(2)
    assert seen == [False]


def test_features_beyond_the_limit_are_computed_in_every_step(monkeypatch):
    monkeypatch.setattr(features_module, "_limit", lambda setup: 3 * 256 * 48 * 8 - 1)
    trainer, losses, images = trained(second_stage(*PLAIN), steps=2)
    assert trainer._features is None
    assert images == 256 + 2 * 64  # one batch told that all would not fit
    assert losses == pytest.approx(trained(second_stage(*PLAIN), reuse=False, steps=2)[1], abs=1e-12)


def test_a_stage_that_was_loaded_computes_its_features_anew(tmp_path):
    config = second_stage(*PLAIN)
    trainer, _, _ = trained(config, steps=3)
    trainer.save(str(tmp_path))
    state, rest = trainer.state(), trainer.train(6).losses
    other, _, _ = trained(config, steps=1)
    with torch.no_grad():
        for parameter in other.setup.model.parameters():
            parameter.add_(1)
    other.load(str(tmp_path), state)
    assert other.train(6).losses == rest
