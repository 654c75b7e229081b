"""RIDE with every registered auxiliary at once, on 22 digits, for tests of what they share."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import aggregation
import experts
from experts import registry
from experts.data.images import ResidentImages
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, MeshShape
from orchestration.training.trainer import StageTrainer
from tests.recipes import WORDS, digits

registry.import_pieces(experts, aggregation)

FEW_WORDS = [*WORDS, "method=ride", "backbone=resnet8", "method.stages.train.batch_size=7"]
# Of what the first view has drawn, some auxiliaries are told.
FEW_WORDS += ["method.stages.train.augment.name=rotated", "method.stages.train.views=[crop_flip]"]
SHAPES = {"packed": (3, 1), "spread": (1, 1), "two replicas": (3, 2), "three by three": (1, 3)}


def words_of(*more, weight=0.3) -> list[str]:
    """Return RIDE with every auxiliary in its first case, but for those that know a head and those that make images."""
    found = [*FEW_WORDS, *more]
    pieces = {name: registry.piece("auxiliary", name) for name in registry.registered_names("auxiliary")}
    alone = [name for name, own in pieces.items() if own.head is None and not own.makes]
    for place, name in enumerate(alone):
        ramp = f"{{ramp: linear, start: {weight}, end: 0}}"  # of the first two
        found += [f"method.stages.train.auxiliaries.x_{name}.name={name}"]
        found += [f"method.stages.train.auxiliaries.x_{name}.weight={weight if place > 1 else ramp}"]
        fields = registry.piece("auxiliary", name).Config.model_fields
        found += [f"method.stages.train.auxiliaries.x_{name}.queue_size=14"] * ("queue_size" in fields)
        found += [f"method.stages.train.auxiliaries.x_{name}.momentum=0.9"] * ("momentum" in fields)
        found += [f"method.stages.train.auxiliaries.x_{name}.after_epoch=1"] * ("after_epoch" in fields)
    return found


@lru_cache
def few():
    """Return 22 digits, of every class; in batches of 7 the fourth has one."""
    whole = digits(0)
    counts_C = np.array([3, 3, *[2] * 8])
    chosen = np.concatenate([np.flatnonzero(whole.train.labels == c)[:n] for c, n in enumerate(counts_C)])
    train = ResidentImages(whole.train.images[torch.from_numpy(chosen)], whole.train.labels[chosen])
    return replace(whole, counts_C=counts_C, train=train)


@lru_cache
def config_of(*more, weight=0.3):
    return load_config(words_of(*more, weight=weight))


@lru_cache
def heads_that_follow(*more):
    """Return the config of three experts with heads that follow the mean of their features, without auxiliaries."""
    (name,) = [name for name in registry.registered_names("head") if registry.piece("head", name).follows]
    words = ["method=ce", "method.num_experts=3", f"method.head.name={name}", "method.stages.train.optimizer.lr=0.1"]
    return load_config([*FEW_WORDS, *words, *more])


@lru_cache
def heads_with_memory(*more):
    """Return the config of three experts with attention and heads whose memory begins as class means and is trained."""
    (trainer,) = [n for n in registry.registered_names("auxiliary") if registry.piece("auxiliary", n).head is not None]
    (attention,) = registry.registered_names("attention")
    words = ["method=ce", "method.num_experts=3", f"method.head.name={registry.piece('auxiliary', trainer).head}"]
    words += [f"method.attention.name={attention}", f"method.stages.train.auxiliaries.memory.name={trainer}"]
    words += ["method.stages.train.lr_factors.memory=0.1", "method.stages.train.optimizer.lr=0.05"]
    return load_config([*FEW_WORDS, *words, *more])


@lru_cache
def images_made(*more):
    """Return RIDE with the auxiliary that makes images, from the second epoch on, beside one that sees two views."""
    name = next(name for name in registry.registered_names("auxiliary") if registry.piece("auxiliary", name).makes)
    at = "method.stages.train.auxiliaries"
    words = [f"{at}.maker.name={name}", f"{at}.maker.after_epoch=1", f"{at}.two.name=supcon", f"{at}.two.weight=0.1"]
    fields = registry.piece("auxiliary", name).Config.model_fields
    words += [f"{at}.maker.{size}=3" for size in ("width", "centres") if size in fields]
    return load_config([*FEW_WORDS, *words, "method.stages.train.optimizer.lr=0.01", *more])


def trainer_of(config, mesh=None, stage="train") -> StageTrainer:
    return StageTrainer(config, stage, few(), mesh or Mesh(MeshShape(3, 3)))


def take(trainer, steps):
    """Return losses and terms of some steps, over the ends of epochs."""
    found, per_epoch = [], trainer.setup.steps_per_epoch
    for _ in range(steps):
        interval = trainer.train(trainer.done + 1)
        found.append({"loss": interval.losses[0], **interval.terms})
    assert per_epoch == 4
    return found


def tensors_of(trainer) -> dict[str, Tensor]:
    momentum = trainer.training.engine.momentum()
    weights = {name: value.cpu().clone() for name, value in trainer.setup.model.state_dict().items()}
    return weights | {f"{name} momentum": value.cpu().clone() for name, value in momentum.items()}
