"""Auxiliaries that make images, beside what test_auxiliaries.py tests of every one."""

from __future__ import annotations

from tests.auxiliaries import images_made, take, trainer_of


def test_images_that_are_made_are_scored_beside_those_of_the_batch():
    """From the second epoch on. The first has batches of 7, 7, 7 and 1 images."""
    trainer, found = trainer_of(images_made()), []
    trainer.setup.objective.register_forward_pre_hook(lambda _, given: found.append((given[0].shape[1], len(given[1]))))
    take(trainer, 6)
    assert [scores for scores, _ in found[:4]] == [7, 7, 7, 1]
    assert max(scores for scores, _ in found[4:]) > 7
    assert all(scores == labels for scores, labels in found)
