"""Parameters of auxiliaries learn in a stage, images that they make are scored, memories of other sizes are refused."""

from __future__ import annotations

import pytest
import torch

from experts.ensemble import part_of
from orchestration.config.compose import load_config
from orchestration.config.identity import difference, identity
from tests.auxiliaries import FEW_WORDS, config_of, images_made, take, trainer_of


@pytest.mark.parametrize("which", [config_of, images_made], ids=["auxiliaries", "images made"])
def test_every_parameter_that_a_loss_reads_learns(which):
    """Without weight decay nothing moves but by gradients, which `named_parameters` does not give in a step."""
    trainer = trainer_of(which("method.stages.train.optimizer.weight_decay=0"))
    before = {name: value.clone() for name, value in trainer.setup.model.named_parameters()}
    take(trainer, 6)
    after = dict(trainer.setup.model.named_parameters())
    own = [name for name in before if part_of(name) == "auxiliaries" and ".embed." not in name]
    assert own
    assert not [name for name in own if torch.equal(after[name], before[name])]


def test_images_that_are_made_are_scored_beside_those_of_the_batch():
    """From the second epoch on. The first has batches of 7, 7, 7 and 1 images."""
    trainer, found = trainer_of(images_made()), []
    trainer.setup.objective.register_forward_pre_hook(lambda _, given: found.append((given[0].shape[1], len(given[1]))))
    take(trainer, 6)
    assert [scores for scores, _ in found[:4]] == [7, 7, 7, 1]
    assert max(scores for scores, _ in found[4:]) > 7
    assert all(scores == labels for scores, labels in found)


def test_a_saved_memory_of_another_size_is_refused(tmp_path):
    """The config's difference is refused before; this is what a checkpoint itself can show."""
    at = "method.stages.train.auxiliaries.m"
    words = [*FEW_WORDS, f"{at}.name=moco", f"{at}.dim=4"]
    first = trainer_of(load_config([*words, f"{at}.queue_size=14"]))
    first.save(str(tmp_path))
    second = trainer_of(load_config([*words, f"{at}.queue_size=21"]))
    message = r"stage train cannot go on from .*auxiliaries.m.queue.keys_Kd is \[14, 4\], needed \[21, 4\] \(6 tensors"
    with pytest.raises(ValueError, match=message):
        second.load(str(tmp_path), first.state())


def test_a_resume_with_a_memory_of_another_size_is_refused_by_key():
    at = "method.stages.train.auxiliaries.m"
    old, new = (identity(load_config([*FEW_WORDS, f"{at}.name=moco", f"{at}.queue_size={size}"])) for size in (14, 21))
    assert difference(old, new) == [f"{at}.queue_size: 14 -> 21"]
