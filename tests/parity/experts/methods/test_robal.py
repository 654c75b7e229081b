"""RoBal's clean form against numbers of its published code (CPU, float32, 6 decimals) and its equations in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aggregation.aggregator import Outputs
from aggregation.robal import RoBalShift
from experts.methods.robal import RoBal, RoBalHead, head_margins
from experts.objective import StepContext
from experts.progress import Progress

COUNTS, LABELS = torch.tensor([100, 10, 1]), torch.tensor([0, 1, 2])
U = torch.tensor([[0.8, 0.3, -0.2], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6]])


def close(found, published) -> None:
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), atol=2e-6, rtol=1e-6)


def loss_of(cosines, labels=LABELS, counts=COUNTS, **settings):
    objective, now = RoBal(RoBal.Config(**settings), counts, 1), Progress(1, 1)
    return objective(10 * cosines[None], labels, StepContext(objective.denominators(labels, now), now))[0]


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({"base_margin": 0.1, "margin_strength": 0.0, "prior_strength": 1.2}, 1.092474),
        ({"base_margin": 0.1, "margin_strength": 0.3, "prior_strength": 1.5}, 1.798873),
        ({"base_margin": 0.0, "margin_strength": 0.0, "prior_strength": 0.0}, 0.123100),
    ],
    ids=["clean", "robust", "plain"],
)
def test_the_loss_is_the_published_one(settings, published):
    close(loss_of(U, **settings), published)


def test_margins_and_prior_are_the_published_ones():
    close(head_margins(COUNTS, base=0.1, strength=0.3, scale=10), [0.238155, 0.169078, 0.1])
    objective = RoBal(RoBal.Config(), COUNTS, 1)
    close(1.2 * objective.log_prior_C, [-0.125232, -2.888334, -5.651436])


FEATURES = torch.tensor([[1, 2], [-1, 0.5]])


def head(scale):
    built = RoBalHead(RoBalHead.Config(scale=scale), 2, 3)
    built.weight.data = torch.tensor([[3, 4], [0, 0.5], [-1, 0]]).T.contiguous()
    return built


def test_the_head_and_its_shift_at_test_give_the_published_scores():
    cosines = head(1)(FEATURES).detach()
    close(cosines, [[0.977759, 0.841814, -0.433662], [-0.177774, 0.420907, 0.867323]])
    shift = RoBalShift(RoBalShift.Config(), COUNTS, ("expert0",))
    shifted = shift(Outputs(head(10)(FEATURES).detach()[None], torch.zeros(1, 0), None))
    close(shifted, [[9.788025, 8.658833, -3.865664], [-1.767308, 4.449764, 9.144187]])


def robal_in_numpy(u, labels, counts, m0, tau_m, tau_b):
    prior = counts / counts.sum()
    losses = []
    for u_C, y in zip(u, labels, strict=True):
        score = 10 * u_C + tau_b * np.log(prior)
        score[y] -= 10 * (m0 + tau_m * np.log(counts[y] / counts.min()) / 10)
        losses.append(np.log(np.exp(score).sum()) - score[y])
    return np.mean(losses)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_equals_its_equation_and_has_its_gradient_in_float64(seed):
    """dL/du = s (softmax(shifted scores) - onehot) / B."""
    rng = np.random.default_rng(seed)
    u, labels, counts = rng.uniform(-1, 1, (9, 6)), rng.integers(0, 6, size=9), rng.integers(1, 500, size=6)
    cosines = torch.tensor(u, requires_grad=True)
    settings = {"base_margin": 0.2, "margin_strength": 0.3, "prior_strength": 1.5}
    found = loss_of(cosines, torch.tensor(labels), torch.tensor(counts), **settings)
    assert found.item() == pytest.approx(robal_in_numpy(u, labels, counts, 0.2, 0.3, 1.5), rel=1e-12)
    found.backward()
    score = 10 * u + 1.5 * np.log(counts / counts.sum())
    onehot = np.eye(6)[labels]
    score -= 10 * onehot * (0.2 + 0.3 * np.log(counts / counts.min()) / 10)
    p = np.exp(score) / np.exp(score).sum(1, keepdims=True)
    torch.testing.assert_close(cosines.grad, torch.tensor(10 * (p - onehot) / 9), atol=1e-12, rtol=1e-12)


def test_it_says_what_its_scores_are_trained_for():
    log_share_C = (COUNTS / COUNTS.sum()).double().log()
    found_EC, words = RoBal.Config().trained_log_prior(COUNTS, log_share_C, 2)
    assert words == ("train^-0.2",) * 2
    torch.testing.assert_close(found_EC, (-0.2 * log_share_C).expand(2, -1))
