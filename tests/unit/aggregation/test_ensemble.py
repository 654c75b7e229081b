"""The two rules by hand; contract/test_aggregators.py has what every rule must do."""

from __future__ import annotations

import torch

from aggregation.ensemble import MeanLogits, MeanProbabilities

# Two classes; expert 0 is nearly certain of class 0, two experts lean to class 1.
LOGITS = torch.tensor([[[6.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]], dtype=torch.float64)


def test_mean_logits():
    """(6 + 0 + 0) / 3 = 2 and (0 + 1 + 1) / 3: class 0."""
    scores = MeanLogits(MeanLogits.Config())(LOGITS)
    torch.testing.assert_close(scores, torch.tensor([[2.0, 2 / 3]], dtype=torch.float64))


def test_mean_probabilities():
    """(0.997527 + 0.268941 + 0.268941) / 3 = 0.511803."""
    log_p = MeanProbabilities(MeanProbabilities.Config())(LOGITS)
    expected = torch.tensor([[0.511803, 0.488197]], dtype=torch.float64)
    torch.testing.assert_close(log_p.exp(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(log_p.softmax(dim=1), expected, atol=1e-6, rtol=0)


def test_many_timid_votes_beat_one_loud_one_in_probability_only():
    loud = torch.cat([LOGITS, LOGITS[1:]])
    assert MeanLogits(MeanLogits.Config())(loud).argmax() == 0
    assert MeanProbabilities(MeanProbabilities.Config())(loud).argmax() == 1
