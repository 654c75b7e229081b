"""GCL's loss against numbers of its published code (Keke921/GCLLoss @ c2a6233, CPU, float32, 6 decimals), and in NumPy.

The published noise is given to the loss as it was drawn there: uniform numbers are chosen that the loss turns into it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.methods.gcl import GCL, cloud_sizes, half_normal
from experts.objective import ExtraInputs, StepContext
from experts.progress import Progress

COUNTS, LABELS = torch.tensor([100, 40, 10, 4]), torch.tensor([0, 2, 3])
COSINES = torch.tensor([[0.9, 0.2, -0.3, 0.1], [0.15, 0.6, 0.35, -0.4], [-0.2, 0.3, 0.5, 0.7]], dtype=torch.float64)
EPS = torch.tensor([[0.3, -0.2, 0.5, -0.1], [0, 0.4, -1.4, 0.25], [-0.6, 0.1, 0.2, 0.35]], dtype=torch.float64)


def close(found, published) -> None:
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), atol=2e-6, rtol=1e-6)


def loss_of(cosines, labels, counts, eps, **settings):
    """Return the loss with noise eps for the first expert and none for others."""
    config = GCL.Config(**settings)
    objective, now = GCL(config, counts, len(cosines)), Progress(1, 1)

    def draws(what, width):
        noise = eps if what == "noise/0" else torch.zeros_like(eps)
        assert noise.shape[-1] == width
        return torch.special.ndtr(3 * noise)

    context = StepContext(objective.denominators(labels, now), now, ExtraInputs(draws=draws))
    return objective(config.scale * cosines, labels, context)[0]


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({"margin": 0.0, "scale": 30.0, "strength": 0.5}, 5.525536),
        ({"margin": 0.1, "scale": 20.0, "strength": 0.5, "gamma": 1.0}, 4.472567),
        ({"margin": 0.0, "scale": 30.0, "strength": 1.0}, 8.796157),
    ],
    ids=["first stage", "second stage", "places"],
)
def test_the_loss_is_the_published_one(settings, published):
    close(loss_of(COSINES[None], LABELS, COUNTS, EPS, **settings), published)


def test_the_clouds_are_the_published_ones_and_nothing_for_equal_counts():
    close(cloud_sizes(COUNTS), [0, 0.284662, 0.715338, 1])
    close(cloud_sizes(torch.tensor([7, 7, 7])), [0.0, 0, 0])


def test_the_noise_has_the_published_distribution():
    """|eps| with deviation 1/3, cut at 1, has mean sqrt(2 / pi) / 3 less what is cut, and 0.27 % at 1."""
    even = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    found = half_normal(even)
    assert found.mean().item() == pytest.approx(np.sqrt(2 / np.pi) / 3, rel=1e-3)
    assert (found == 1).double().mean().item() == pytest.approx(0.0027, rel=0.01)
    assert half_normal(torch.zeros(1, dtype=torch.float64)) == 1  # the end of the uniform draws is no infinity


def gcl_in_numpy(u, labels, counts, eps, *, scale, strength, margin, gamma):
    delta = (np.log(counts.max()) - np.log(counts)) / (np.log(counts.max()) - np.log(counts.min()))
    total = 0.0
    for u_C, y, eps_C in zip(u, labels, eps, strict=True):
        score = u_C - strength * np.abs(np.clip(eps_C, -1, 1)) * delta
        score[y] -= margin
        p = np.exp(scale * score)[y] / np.exp(scale * score).sum()
        total -= (1 - p) ** gamma * np.log(p)
    return total / len(labels)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_the_loss_equals_its_equation_in_float64(gamma, seed):
    """Tolerance 1e-9: the noise goes through the normal distribution and back."""
    rng = np.random.default_rng(seed)
    u, labels, counts = rng.uniform(-1, 1, (9, 6)), rng.integers(0, 6, size=9), rng.integers(1, 500, size=6)
    eps = rng.normal(size=(9, 6)) / 3
    settings = {"scale": 8.0, "strength": 0.7, "margin": 0.2, "gamma": gamma}
    found = loss_of(torch.tensor(u)[None], torch.tensor(labels), torch.tensor(counts), torch.tensor(eps), **settings)
    assert found.item() == pytest.approx(gcl_in_numpy(u, labels, counts, eps, **settings), rel=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_gradient_is_the_closed_form(gamma):
    """dL/du = s (1 - p_y)^gamma (softmax(clouded scores) - onehot) / B: the focal factor is held constant."""
    cosines = COSINES[None].clone().requires_grad_()
    loss_of(cosines, LABELS, COUNTS, EPS, scale=20.0, margin=0.1, gamma=gamma).backward()
    onehot = torch.nn.functional.one_hot(LABELS, 4).double()
    score = 20 * (COSINES - 0.5 * EPS.clamp(-1, 1).abs() * cloud_sizes(COUNTS) - 0.1 * onehot)
    p = score.softmax(-1)
    factor_B1 = (1 - (p * onehot).sum(-1, keepdim=True)) ** gamma
    torch.testing.assert_close(cosines.grad[0], 20 * factor_B1 * (p - onehot) / 3, atol=1e-10, rtol=1e-9)


def test_every_expert_has_noise_of_its_own():
    found = loss_of(COSINES.expand(2, -1, -1), LABELS, COUNTS, EPS)
    one = loss_of(COSINES[None], LABELS, COUNTS, EPS)
    none = loss_of(COSINES[None], LABELS, COUNTS, torch.zeros_like(EPS))
    torch.testing.assert_close(found, one + none)
    assert not torch.isclose(one, none)
