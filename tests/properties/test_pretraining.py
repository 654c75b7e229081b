"""A network is pre-trained without labels, and any ensemble goes on from it, wherever its experts live."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.augmentation.stack import Stack
from experts.batches import Replica
from experts.ensemble import part_of
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, MeshShape
from orchestration.training.trainer import StageTrainer
from tests.auxiliaries import SHAPES, few
from tests.recipes import WORDS
from tests.threads import run_mesh

PRETRAIN = "method.stages.pretrain"
RIDE = [
    "method.num_experts=3", "method.reduce_dimension=true", "method.head={name: cosine, scale: 30}",
    "method.stages.train.objective.name=ride",
]  # fmt: skip
FEW = [*WORDS, "backbone=resnet8", "engine.precision=float64", f"{PRETRAIN}.batch_size=7"]
FEW += ["method.stages.train.batch_size=7", "method.stages.train.optimizer.lr=0.01", f"{PRETRAIN}.optimizer.lr=0.01"]


def test_every_replica_knows_how_all_images_of_a_step_are_turned():
    """With the turn undone, and nothing else random, they are the images as they are stored."""
    config = load_config([*FEW, "method=ssp_rotation", f"{PRETRAIN}.augment=[{{name: quarter_turn}}]"])
    setup = StageTrainer(config, "pretrain", few(), Mesh(MeshShape(1, 1))).training
    stream, plain = setup.batches, Stack([], config.dataset.mean, config.dataset.std)
    turned = set()
    for step in (0, 3):
        batches = []
        for index in range(3):
            stream.replica = Replica(index, 3, dtype=torch.float64)
            batches.append(stream.batch(2, step))
        told = batches[0].told["quarter_turn"]
        assert all(torch.equal(batch.told["quarter_turn"], told) for batch in batches)
        images = torch.cat([batch.images_B3HW for batch in batches])
        positions = torch.cat([batch.positions_B for batch in batches])
        as_stored = plain(few().train.images[positions], {}, torch.float64)
        turned |= set(told.tolist())
        for image, original, turns in zip(images, as_stored, told.tolist(), strict=True):
            assert torch.equal(image, torch.rot90(original, turns, (1, 2)))
    assert len(turned) > 1


def tensors_of(trainer):
    return {name: value.clone() for name, value in trainer.setup.model.state_dict().items()}


@pytest.mark.parametrize("recipe", ["ssp_rotation", "ssp_moco"])
def test_ride_goes_on_from_a_pre_trained_network_wherever_its_experts_live(recipe, tmp_path):
    """Trunk, features and their statistics carry over; heads begin with weights that the first stage has not seen."""
    config = load_config([*FEW, f"method={recipe}", *RIDE])
    found = {}
    for name in ("packed", "spread"):
        folder = tmp_path / name
        folder.mkdir()

        def work(mesh, lock, folder=folder):
            with lock:
                first = StageTrainer(config, "pretrain", few(), mesh)
            losses = [first.train(first.done + 1).losses[0] for _ in range(2)]
            first.save(str(folder))
            with lock:
                second = StageTrainer(config, "train", few(), mesh)
            fresh = tensors_of(second)
            second.start_from(str(folder))
            before, after = tensors_of(first), tensors_of(second)
            for key, value in after.items():
                source = fresh if part_of(key) == "heads" else before
                assert torch.equal(value, source[key]), key
            assert not any(torch.equal(after[key], before[key]) for key in after if part_of(key) == "heads")
            return losses + [second.train(second.done + 1).losses[0] for _ in range(2)]

        answers = run_mesh(MeshShape(3, *SHAPES[name]), work)
        assert all(answer == answers[0] for answer in answers)
        found[name] = answers[0]
    assert all(np.isfinite(found["packed"])) and found["packed"][1] > 0  # a queue begins empty
    assert found["spread"] == pytest.approx(found["packed"], rel=1e-8)
