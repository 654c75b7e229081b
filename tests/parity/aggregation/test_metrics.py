"""Groups and calibration against published routines.

Origin: groups, facebookresearch/classifier-balancing @ f162ade and Long-Tailed-Recognition.pytorch @ 5c916d0;
calibration, dvlab-research/MiSLAS @ 0fc381e; class-group sizes, counted from the published count formula.
Tolerance: half a unit of the last printed decimal.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aggregation.metrics import Scores, expected_calibration_error, groups_by_count, groups_by_index

LABELS = np.array([0, 1, 2, 0, 1, 2, 3, 3])
PREDICTIONS = np.array([0, 1, 1, 0, 1, 2, 0, 3])


def cifar_counts(num_classes, largest, ratio):
    return [int(largest * (1 / ratio) ** (i / (num_classes - 1))) for i in range(num_classes)]


def sizes(groups):
    return tuple(len(groups[name]) for name in ("many", "medium", "few"))


@pytest.mark.parametrize(
    ("ratio", "published"),
    [(200, (30, 31, 39)), (100, (35, 35, 30)), (50, (41, 41, 18)), (20, (53, 47, 0)), (10, (69, 31, 0))],
)
def test_group_sizes_of_cifar100(ratio, published):
    counts = cifar_counts(100, 500, ratio)
    assert sizes(groups_by_count(counts)) == published
    assert sizes(groups_by_index(counts, (36, 71))) == (36, 35, 29)


def test_group_sizes_of_cifar10():
    counts = cifar_counts(10, 5000, 100)
    assert sizes(groups_by_count(counts)) == (8, 2, 0)
    assert sizes(groups_by_index(counts, (3, 7))) == (3, 4, 3)


def test_group_accuracies_are_the_published_ones():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    predictions = torch.tensor([0, 0, 1, 1, 0, 2, 2, 3, 2, 0])
    scores = Scores()
    scores.update({"ensemble": torch.nn.functional.one_hot(predictions, 4).float()}, labels)
    top1 = scores.result([120, 100, 20, 19], None)["members"]["ensemble"]["top1"]
    assert top1["many"] == pytest.approx(0.666667, abs=6e-7)
    assert (top1["medium"], top1["few"], top1["all"]) == pytest.approx((0.625, 0.0, 0.6))


def test_calibration_with_15_bins():
    confidence = np.array([0.95, 0.81, 0.40, 0.62, 1 / 3, 0.55, 0.70, 0.99])
    correct = LABELS == PREDICTIONS
    assert expected_calibration_error(confidence, correct) == pytest.approx((0.355833, 0.7), abs=6e-7)
    assert (correct.mean(), confidence.mean()) == pytest.approx((0.750, 0.669167), abs=6e-7)


def test_calibration_with_confidences_on_the_edges():
    confidence = np.array([0.2, 0.4, 0.6, 0.8, 1, 0.2, 0.4, 0.6])
    assert expected_calibration_error(confidence, LABELS == PREDICTIONS, bins=5) == pytest.approx((0.275, 0.8))
