"""Intervals hold what they promise: coverage by simulation, quantiles by the published table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestration.reports.statistics import (
    FEWEST_CLASSES,
    bootstrap,
    mean_and_sd,
    paired_interval,
    student_quantile,
)


@pytest.mark.parametrize(
    ("freedom", "published"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_quantiles_are_those_of_the_printed_tables(freedom, published):
    assert student_quantile(freedom) == pytest.approx(published, abs=6e-4)


def test_the_paired_interval_of_three_seeds_can_be_done_by_hand():
    """Mean 2, standard deviation 1, t(2) = 4.303: 2 +- 4.303 / sqrt(3)."""
    found = paired_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert found == pytest.approx((2.0, 2 - half, 2 + half))
    assert not found.excludes_zero


def test_one_seed_has_a_mean_and_no_interval():
    assert mean_and_sd([0.4]) == (0.4, None)
    assert mean_and_sd([]) == (None, None)
    assert paired_interval([0.4]) is None
    assert paired_interval([0.4, 0.4]) is None, "no spread to go by"
    assert paired_interval([0.4, 0.4, 0.4]) == pytest.approx((0.4, 0.4, 0.4))


def test_the_paired_interval_covers_the_true_difference_in_95_of_100_studies():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.02, 0.01, size=(4000, 3))
    intervals = [paired_interval(row) for row in differences.tolist()]
    covered = np.mean([one.low <= 0.02 <= one.high for one in intervals])
    assert 0.94 < covered < 0.96  # two standard errors are 0.007


def test_the_bootstrap_covers_the_true_difference_where_images_are_drawn():
    """Two few-shot classes of 200 images: the interval is about other images of these classes."""
    rng, covered = np.random.default_rng(1), []
    labels = np.repeat([0, 1], 200)
    truth = np.array([0.10, 0.02])  # of classes, and so 0.06 of the group
    for trial in range(300):
        ours = rng.random(400) < 0.5 + truth[labels]
        theirs = rng.random(400) < 0.5
        values = (ours.astype(float) - theirs)[:, None]
        (found,) = bootstrap(values, labels, {"few": [0, 1]}, draws=300, seed=trial)["few"]
        covered.append(found.low <= 0.06 <= found.high)
    assert 0.91 < np.mean(covered) < 0.985


def test_the_bootstrap_covers_the_true_difference_where_classes_are_drawn():
    """Sixty classes of three images, each class with a difference of its own: the interval is about other classes."""
    rng, covered = np.random.default_rng(2), []
    labels = np.repeat(np.arange(60), 3)
    for trial in range(400):
        gain = rng.normal(0.05, 0.15, 60)[labels]
        values = ((rng.random(180) < 0.5 + gain).astype(float) - (rng.random(180) < 0.5))[:, None]
        (found,) = bootstrap(values, labels, {"few": range(60)}, draws=300, seed=trial)["few"]
        covered.append(found.low <= 0.05 <= found.high)
    assert 0.91 < np.mean(covered) < 0.98


def test_means_are_those_of_the_table_and_all_is_over_images():
    """Classes of 1 and 3 images: the group's value weighs classes alike, `all` weighs images alike."""
    values = np.array([[1.0], [0.0], [0.0], [1.0]])
    found = bootstrap(values, np.array([0, 1, 1, 1]), {"many": [0], "few": [1], "medium": []}, draws=50)
    assert found["all"][0].mean == 0.5
    assert found["many"][0] == (1.0, 1.0, 1.0)
    assert found["few"][0].mean == pytest.approx(1 / 3)
    assert "medium" not in found


def test_the_same_seed_gives_the_same_interval_whatever_the_order_of_images_and_other_columns():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2 * FEWEST_CLASSES, 400)
    values = rng.integers(-1, 2, size=(400, 2)).astype(float)
    groups = {"many": range(FEWEST_CLASSES), "few": range(FEWEST_CLASSES, 2 * FEWEST_CLASSES)}
    whole = bootstrap(values, labels, groups, draws=100)
    order = rng.permutation(400)
    again = bootstrap(values[order][:, 1:], labels[order], groups, draws=100)
    for key in ("all", *groups):
        assert again[key][0] == pytest.approx(whole[key][1])


def test_a_difference_that_every_image_shows_has_no_spread():
    found = bootstrap(np.ones((100, 1)), np.repeat(np.arange(50), 2), {"few": range(50)}, draws=20)
    assert found["few"][0] == (1.0, 1.0, 1.0)
