"""DCL against its formulas by hand, and its triplets against a transcription, one after the other, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from experts.auxiliaries.auxiliary import Seen
from experts.methods.dcl import DCL, EasyAnchors, batch_ratios
from experts.objective import ExtraInputs, StepContext
from experts.progress import Progress

COUNTS = torch.tensor([100, 10, 1])
LOG_TRAIN = COUNTS.double().log()


def test_ratios_are_those_of_a_batch_by_hand():
    """The target is (10, 3.162278, 1), a batch of (64, 12, 4) is (16, 3, 1)."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([64, 12, 4]))
    found = batch_ratios(labels, LOG_TRAIN, 0.5)[[0, 64, 76]]
    torch.testing.assert_close(found, torch.tensor([0.625, 1.054093, 1.0], dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_class_that_the_batch_lacks_is_left_out():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert batch_ratios(labels, LOG_TRAIN, 0.0).tolist() == [0.5] * 4 + [1.0] * 2
    torch.testing.assert_close(batch_ratios(labels, LOG_TRAIN, 1.0), torch.tensor([50.0] * 4 + [10.0] * 2).double())


@pytest.mark.parametrize("mean", ["images", "weights"])
def test_the_loss_weighs_images_by_their_ratios_and_drops_those_below_one_as_drawn(mean):
    """In the last of two epochs of a linear schedule the power is 1/2."""
    labels = torch.tensor([0] * 16 + [1] * 2 + [2])
    draws = torch.linspace(0, 0.95, 19, dtype=torch.float64)
    logits = torch.randn(1, 19, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = DCL(DCL.Config(schedule={"ramp": "linear", "start": 1, "end": 0}, mean=mean), COUNTS, 1)
    now = Progress(2, 2)
    extra = ExtraInputs(draws=lambda what, width: draws[:, None])
    loss, _ = objective(logits, labels, StepContext(objective.denominators(labels, now), now, extra))
    nll = -logits[0].log_softmax(dim=1)[torch.arange(19), labels]
    weights = [*(1.0 if d < 10 / 16 else 0.0 for d in draws[:16].tolist()), *[10**0.5 / 2] * 2, 1.0]
    assert 0 < sum(weights[:16]) < 16
    divisor = 19 if mean == "images" else sum(weights)
    torch.testing.assert_close(loss, (nll * torch.tensor(weights, dtype=torch.float64)).sum() / divisor)


def test_anchors_are_sure_and_right_and_the_others_hard():
    rng = np.random.default_rng(5)
    labels = np.array([0, 1, 0, 2, 0, 1, 2, 0, 0, 1, 2, 0])  # 6, 3 and 3 images: both of 3 are rare
    features, logits = rng.normal(size=(12, 5)), rng.normal(size=(12, 3))
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    vectors = features / np.linalg.norm(features, axis=1, keepdims=True)
    losses = []
    for c in (1, 2):
        own, others = np.flatnonzero(labels == c).tolist(), np.flatnonzero(labels != c).tolist()
        s = scores[:, c]
        for a in sorted(own, key=lambda j: -s[j])[:2]:
            if scores[a].argmax() == c:
                positives = sorted((j for j in own if j != a), key=lambda j: s[j])[:2]
                negatives = sorted(others, key=lambda j: -s[j])[:2]
                d = ((vectors - vectors[a]) ** 2).sum(axis=1)
                losses += [max(0, 0.5 + d[p] - d[n]) for p, n in itertools.product(positives, negatives)]
    piece = EasyAnchors(EasyAnchors.Config(anchors=2, hardest=2), 5, torch.tensor([6, 3, 3]))
    seen = Seen(torch.from_numpy(features)[None], None, torch.from_numpy(logits), torch.from_numpy(labels))
    assert 4 <= len(losses) < 16
    assert piece.loss(seen, Progress(1, 2)).item() == pytest.approx(np.mean(losses), abs=1e-12)
