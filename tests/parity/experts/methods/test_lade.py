"""LADE against numbers of its published code (hyperconnect/LADE @ 5db5d13, CPU, float32, 6 decimals), and in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.losses.counts import log_prior
from experts.methods.lade import LADE, lade_regulariser
from experts.objective import StepContext
from experts.progress import Progress

COUNTS, LABELS = torch.tensor([100, 40, 10, 4]), torch.tensor([0, 2, 3])
Z = torch.tensor([[2, 0.5, -1, 0], [0.1, 1.2, 0.3, -0.7], [-0.5, 0.4, 0.9, 1.5]])
Z4 = torch.tensor([[2, 0.5, -1, 0], [1, 0, 0.2, -0.3], [0.1, 1.2, 0.3, -0.7], [-0.5, 0.4, 0.9, 1.5]])
LABELS4 = torch.tensor([0, 0, 2, 3])


def regulariser(z, labels, penalty, ratio="column", counts=COUNTS):
    return lade_regulariser(z[None], labels, log_prior_C=log_prior(counts), penalty=penalty, ratio=ratio)[0].item()


def loss_of(z, labels, counts=COUNTS, **settings):
    objective, now = LADE(LADE.Config(**settings), counts, len(z)), Progress(1, 1)
    return objective(z, labels, StepContext(objective.denominators(labels, now), now))


@pytest.mark.parametrize(("penalty", "published"), [(0.1, -0.824922), (0.5, -0.599576), (0.01, -0.875625)])
def test_the_regulariser_is_the_published_one(penalty, published):
    assert regulariser(Z, LABELS, penalty) == pytest.approx(published, abs=2e-6)


@pytest.mark.parametrize(("ratio", "published"), [("column", -0.569762), ("label", 0.722166)])
def test_the_class_of_the_ratio_is_an_option(ratio, published):
    assert regulariser(Z4, LABELS4, 0.1, ratio) == pytest.approx(published, abs=2e-6)


def test_the_loss_is_balanced_softmax_and_alpha_times_the_regulariser():
    loss, terms = loss_of(Z[None], LABELS, alpha=0.1, penalty=0.1)
    assert terms["balanced_softmax"].item() == pytest.approx(1.751670, abs=2e-6)
    assert terms["regulariser"].item() == pytest.approx(-0.824922, abs=2e-6)
    assert loss.item() == pytest.approx(1.751670 - 0.1 * 0.824922, abs=3e-6)


def lade_in_numpy(z, labels, counts, alpha, penalty, ratio):
    prior, classes, total = counts / counts.sum(), len(counts), 0.0
    for z_BC in z:
        mass = np.exp(z_BC) * prior
        total -= np.mean(np.log(mass[range(len(labels)), labels] / mass.sum(1)))
        for c in range(classes):
            of_class = z_BC[labels == c, c]
            a = of_class.mean() if len(of_class) else 0.0
            weight = 1 / (classes * (prior[c] if ratio == "column" else prior[labels]))
            b = np.log(np.mean(weight * np.exp(z_BC[:, c])))
            total -= alpha * prior[c] * (a - b - penalty * b**2)
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", ["column", "label"])
def test_the_loss_equals_its_equation_in_float64(ratio, seed):
    """Some classes have no image in the batch."""
    rng = np.random.default_rng(seed)
    z, labels, counts = rng.normal(size=(2, 5, 6)) * 2, rng.integers(0, 6, size=5), rng.integers(1, 500, size=6)
    settings = {"alpha": 0.7, "penalty": 0.3, "ratio": ratio}
    found, _ = loss_of(torch.tensor(z), torch.tensor(labels), torch.tensor(counts), **settings)
    assert found.item() == pytest.approx(lade_in_numpy(z, labels, counts, **settings), rel=1e-12)


def test_the_gradient_of_the_regulariser_is_the_closed_form():
    """d/dz_bc = -pi_c (onehot / N_c - (1 + 2 penalty b_c) softmax over images of the weighted scores)."""
    z = Z4.double()[None].requires_grad_()
    prior_C = log_prior(COUNTS)
    lade_regulariser(z, LABELS4, log_prior_C=prior_C, penalty=0.1, ratio="column").sum().backward()
    onehot = torch.nn.functional.one_hot(LABELS4, 4).double()
    weighted = z.detach()[0] - prior_C - np.log(4)
    bound_C = weighted.logsumexp(0) - np.log(4)
    np.testing.assert_allclose(bound_C, [0.128905, 0.585129, 1.647945, 2.783022], atol=2e-6)
    mean = onehot / onehot.sum(0).clamp_min(1)
    expected = -prior_C.exp() * (mean - (1 + 0.2 * bound_C) * weighted.softmax(0))
    torch.testing.assert_close(z.grad[0], expected, atol=1e-12, rtol=1e-12)
