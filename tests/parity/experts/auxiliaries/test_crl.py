"""CRL against its rules by hand, and against a transcription of its formula, triplet by triplet, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.crl import CRL, imbalance, minority_images, rectification
from experts.progress import Progress
from orchestration.config.compose import load_config


@pytest.mark.parametrize(
    ("counts", "rare"), [((10, 6, 3, 1), {1, 2}), ((8, 8, 2, 2), {2, 3}), ((10, 5, 3, 2), {1, 2, 3})]
)
def test_rare_classes_have_half_of_a_batch_at_most_and_two_images_each(counts, rare):
    labels = torch.from_numpy(np.repeat(np.arange(4), counts))[torch.randperm(20)]
    assert set(labels[minority_images(labels, 4, 0.5)].tolist()) == rare


def test_of_equally_rare_classes_the_first_counts():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert labels[minority_images(labels, 3, 0.5)].tolist() == [0, 0]


def test_one_triplet_of_scores_has_the_loss_of_the_formula():
    """Of the anchor with 0.6: |0.6 - 0.3| = 0.3 and 0.6 - 0.5 = 0.1, so 0.7; of the other: 0.3 and -0.2, so 1."""
    logits = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.5, 0.5], [0.1, 0.9]], dtype=torch.float64).log()
    given = torch.zeros(4, 1), logits, torch.tensor([0, 0, 1, 1])
    found = rectification(*given, level="class", share=0.5, most=1, margin=0.5)
    torch.testing.assert_close(found, torch.tensor((0.7 + 1.0) / 2, dtype=torch.float64), rtol=0, atol=1e-12)


def one_by_one(features, scores, labels, rare, level, most, margin):
    """Return the mean over all triplets of mined positives and negatives."""
    losses = []
    for a in (i for i, own in enumerate(labels) if own in rare):
        same = [j for j, own in enumerate(labels) if own == labels[a] and j != a]
        others = [j for j, own in enumerate(labels) if own != labels[a]]
        if level == "class":
            s = scores[:, labels[a]]
            positives, negatives = sorted(same, key=lambda j: s[j]), sorted(others, key=lambda j: -s[j])
            near, far = np.abs(s[a] - s), s[a] - s
        else:
            near = far = np.sqrt(((features - features[a]) ** 2).sum(axis=1))
            positives, negatives = sorted(same, key=lambda j: -near[j]), sorted(others, key=lambda j: far[j])
        losses += [max(0, margin + near[p] - far[n]) for p, n in itertools.product(positives[:most], negatives[:most])]
    return np.mean(losses)


@pytest.mark.parametrize("level", ["class", "instance"])
def test_the_loss_is_the_mean_over_mined_triplets(level):
    rng = np.random.default_rng(4)
    labels = np.array([0, 1, 0, 2, 0, 1, 2, 0, 0, 1, 3, 0])  # 6, 3, 2 and 1 images: the last three have half of them
    features, logits = rng.normal(size=(12, 5)), rng.normal(size=(12, 4))
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    given = torch.from_numpy(features), torch.from_numpy(logits), torch.from_numpy(labels)
    found = rectification(*given, level=level, share=0.5, most=2, margin=0.5)
    assert found.item() == pytest.approx(one_by_one(features, scores, labels, {1, 2}, level, 2, 0.5), abs=1e-12)
    counts_C = torch.tensor([50, 25, 20, 5])  # 100 of the 200 images of a balanced set
    assert imbalance(counts_C.tolist()) == 0.5
    piece = CRL(CRL.Config(level=level, hardest=2, strength=0.4), 5, counts_C).double()
    loss = piece.loss(Seen(given[0][None], None, given[1], given[2]), Progress(1, 2))
    torch.testing.assert_close(loss, 0.2 / 0.8 * found, rtol=1e-12, atol=0)


def test_balanced_images_have_no_class_to_rectify():
    piece = CRL(CRL.Config(), 3, torch.tensor([20, 20]))
    assert (
        piece.loss(Seen(torch.randn(1, 6, 3), None, torch.randn(6, 2), torch.tensor([0, 1] * 3)), Progress(1, 2)) == 0
    )


def test_a_batch_in_which_no_class_can_be_rare_is_refused():
    words = ["method=crl", "dataset=digits_lt", "method.stages.train.batch_size=3"]
    with pytest.raises(
        ValueError, match=r"share = 0.5: rare classes have at most 1.5 images of a batch of 3; needed 2"
    ):
        load_config(words)
