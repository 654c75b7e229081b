"""Kept predictions give back what was scored, and their measures are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from sklearn import metrics

from aggregation.predictions import Predictions, confusion, images_per_class, measures, wilson_interval

CLASSES = 7


@pytest.fixture
def kept():
    draws = np.random.default_rng(0)
    labels = draws.choice(CLASSES - 1, 300, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])  # the last class has no image
    scores = draws.normal(size=(2, 300, CLASSES)).round(1)  # with equal largest ones
    scores[0, np.arange(300), labels] += 1.5
    parts = [
        Predictions.of_batch(
            {"ensemble": torch.tensor(scores[0, part]), "expert0": torch.tensor(scores[1, part])},
            torch.tensor(labels[part]),
        )
        for part in (slice(0, 100), slice(100, 300))
    ]
    return Predictions.joined(parts), labels, scores


def test_they_are_in_the_order_of_the_images_and_come_back_from_a_file(kept, tmp_path):
    found, labels, scores = kept
    with open(tmp_path / "p.npz", "wb") as file:
        found.write(file)
    again = Predictions.read(tmp_path / "p.npz")
    for one in (found, again):
        assert one.names == ("ensemble", "expert0")
        assert np.array_equal(one.labels_N, labels)
        assert np.array_equal(one.predicted_MN, scores.argmax(axis=2))  # the first of equals
        assert np.array_equal(one.logits_MNC, scores.astype(np.float16))
    order = np.argsort(-scores, axis=2, kind="stable")
    assert np.array_equal(found.rank_MN, (order == labels[None, :, None]).argmax(axis=2))


def test_measures_are_those_of_scikit_learn(kept):
    found, labels, scores = kept
    for member, own in zip(found.names, scores, strict=True):
        result, predicted = measures(found, CLASSES)[member], own.argmax(axis=1)
        assert result["top1"] == pytest.approx(metrics.accuracy_score(labels, predicted))
        with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
            assert result["balanced"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
        there = list(range(CLASSES - 1))
        f1 = metrics.f1_score(labels, predicted, labels=there, average="macro", zero_division=0)
        assert result["macro_f1"] == pytest.approx(f1)
        matrix = metrics.confusion_matrix(labels, predicted, labels=range(CLASSES))
        assert np.array_equal(confusion(found, member, CLASSES), matrix)
        recall = matrix.diagonal()[:-1] / matrix.sum(axis=1)[:-1]
        worst = {"class": int(recall.argmin()), "accuracy": recall.min(), "images": int(matrix[recall.argmin()].sum())}
        assert result["worst_class"] == worst
        np.fill_diagonal(matrix, 0)
        first = result["confused"][0]
        assert matrix[first["label"], first["predicted"]] == first["images"] == matrix.max()
        top5 = metrics.top_k_accuracy_score(labels, own + np.arange(CLASSES) * -1e-9, k=5, labels=range(CLASSES))
        assert result["top5"] == pytest.approx(top5)


def test_reliability_adds_up_and_is_left_out_where_scores_are_no_probabilities(kept):
    found, labels, scores = kept
    bins = measures(found, CLASSES)["ensemble"]["reliability"]
    assert sum(one["images"] for one in bins) == len(labels)
    right = sum(one["images"] * one["accuracy"] for one in bins if one["images"])
    assert right == pytest.approx((scores[0].argmax(axis=1) == labels).sum())
    assert all(b / 15 < one["confidence"] <= (b + 1) / 15 for b, one in enumerate(bins) if one["images"])
    assert measures(found, CLASSES, probabilities=False)["ensemble"]["reliability"] is None


def test_images_of_each_class_come_from_the_labels_alone(kept, tmp_path):
    found, labels, _ = kept
    with open(tmp_path / "p.npz", "wb") as file:
        found.write(file)
    assert images_per_class(tmp_path / "p.npz", CLASSES).tolist() == np.bincount(labels, minlength=CLASSES).tolist()
    assert images_per_class(tmp_path / "none.npz", CLASSES) is None


def test_the_interval_of_an_accuracy_is_scipys():
    for right, images in ((0, 5), (3, 60), (60, 60), (711, 1000)):
        expected = binomtest(right, images).proportion_ci(method="wilson")
        found = wilson_interval(np.array([right / images]), np.array([images]), z=norm.ppf(0.975))
        assert np.concatenate(found) == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_scores_that_are_not_finite_are_never_counted_as_right():
    with pytest.raises(ValueError, match="not finite"):
        Predictions.of_batch({"ensemble": torch.full((2, 3), torch.nan)}, torch.tensor([0, 1]))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "p.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"p\.npz: found no predictions"):
        Predictions.read(tmp_path / "p.npz")
