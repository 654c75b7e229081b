"""Every registered sampler draws positions of the training set as a pure function of progress and key."""

from __future__ import annotations

import numpy as np
import pytest

import experts
from experts import registry
from experts.cases import cases_of
from experts.progress import Progress

registry.import_pieces(experts)

COUNTS = np.array([60, 25, 10, 5])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
CASES = [case.config for name in registry.registered_names("sampler") for case in cases_of("sampler", name)]
every_sampler = pytest.mark.parametrize("config", CASES, ids=lambda config: config.name)


def test_the_samplers_of_the_recipes_are_registered():
    needed = {"instance_balanced", "class_balanced", "square_root", "progressively_balanced", "effective_number"}
    needed |= {"reversed", "oversampled", "undersampled", "capped", "most_similar"}
    assert needed <= set(registry.registered_names("sampler"))


EPOCHS = 40


def sampler(config):
    return registry.build("sampler", config, LABELS, len(COUNTS))


def at(epoch):
    return Progress(epoch, EPOCHS, 0, 1)


@every_sampler
def test_an_epoch_has_as_many_positions_as_it_says_and_they_lie_in_the_training_set(config):
    positions = sampler(config).draw(at(1), 7)
    assert positions.dtype == np.int64
    assert positions.shape == (sampler(config).draws_per_epoch,)
    assert 0 <= positions.min() <= positions.max() < len(LABELS)


@every_sampler
def test_the_same_moment_and_key_give_the_same_epoch_and_another_key_gives_another(config):
    one, other = sampler(config), sampler(config)
    late = one.draw(at(3), 7)
    one.draw(at(1), 5)
    assert np.array_equal(one.draw(at(3), 7), late)
    assert np.array_equal(other.draw(at(3), 7), late)
    assert not np.array_equal(other.draw(at(3), 8), late)


@every_sampler
def test_classes_are_drawn_as_often_as_the_sampler_says(config):
    """Over 40 keys; the mean number of draws of a class lies within 5 standard deviations of independent draws."""
    made = sampler(config)
    share_C = made.class_probabilities(at(EPOCHS))
    assert share_C.sum() == pytest.approx(1)
    drawn_C = sum(np.bincount(LABELS[made.draw(at(EPOCHS), key)], minlength=4) for key in range(40)) / 40
    expected_C = made.draws_per_epoch * share_C
    assert (abs(drawn_C - expected_C) <= 5 * np.sqrt(expected_C / 40)).all()


@every_sampler
def test_a_sampler_says_whether_it_keeps_the_distribution_of_the_training_set(config):
    shares = [sampler(config).class_probabilities(at(epoch)) for epoch in (1, EPOCHS // 2, EPOCHS)]
    assert np.allclose(shares, COUNTS / COUNTS.sum()) == sampler(config).keeps_distribution


@every_sampler
def test_a_class_without_an_image_is_refused(config):
    with pytest.raises(ValueError, match="at least 1 image of every class"):
        registry.build("sampler", config, LABELS, len(COUNTS) + 1)
