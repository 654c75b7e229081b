"""Cross-entropy, class-balanced weights, LDAM and LDAM-DRW against numbers from published codes and NumPy.

Origin of the numbers: official functions on CPU in float32, printed to 6 decimals; torch for cross-entropy,
kaidic/LDAM-DRW @ 2536330 for weights and LDAM. Tolerance 2e-6: the last printed decimal and float32 rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.losses.class_balanced import effective_number_weights
from experts.losses.cross_entropy import CrossEntropy, cross_entropy
from experts.losses.ldam import ldam_loss, ldam_margins
from experts.methods.ldam import LDAM
from experts.objective import StepContext
from experts.progress import Progress

COUNTS = torch.tensor([100, 40, 10, 4])
LABELS = torch.tensor([0, 2, 3])
Z = torch.tensor([[2, 0.5, -1, 0], [0.1, 1.2, 0.3, -0.7], [-0.5, 0.4, 0.9, 1.5]])
COSINES = torch.tensor([[0.9, 0.2, -0.3, 0.1], [0.15, 0.6, 0.35, -0.4], [-0.2, 0.3, 0.5, 0.7]])
IMAGES = torch.tensor(3.0, dtype=torch.float64)
ONE = torch.tensor(1.0)


def close(found, published, atol=2e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), torch.tensor(published, dtype=torch.float64), atol=atol, rtol=1e-6
    )


def per_image(loss, logits_BC):
    """The loss of every image alone."""
    return torch.cat([loss(logits_BC[None, b : b + 1], LABELS[b : b + 1]) for b in range(len(LABELS))])


def test_cross_entropy_is_the_published_one():
    close(cross_entropy(Z[None], LABELS, denominator=IMAGES), [0.860007])
    close(per_image(lambda z, y: cross_entropy(z, y, denominator=ONE), Z), [0.342350, 1.536052, 0.701620])


def test_the_cross_entropy_objective_gives_the_published_loss():
    objective, progress = CrossEntropy(CrossEntropy.Config(), COUNTS, 1), Progress(1, 1)
    loss, terms = objective(Z[None], LABELS, StepContext(objective.denominators(LABELS, progress), progress))
    close(loss, 0.860007)
    close(terms["cross_entropy"], [0.860007])


@pytest.mark.parametrize(
    ("beta", "published"),
    [
        (0.9999, [0.104362, 0.260125, 1.038941, 2.596572]),
        (0.999, [0.108612, 0.263594, 1.038734, 2.589061]),
        (0.99, [0.156041, 0.298841, 1.034586, 2.510532]),
        (0.9, [0.619385, 0.628661, 0.950941, 1.801013]),
        (0.0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_class_balanced_weights_are_the_published_ones(beta, published):
    close(effective_number_weights(COUNTS, beta=beta), published)


def test_class_balanced_cross_entropy_divides_by_the_sum_of_weights():
    weight_C = effective_number_weights(COUNTS, beta=0.9999)
    weighted_mean = cross_entropy(Z[None], LABELS, denominator=weight_C[LABELS].sum(), weight_C=weight_C)
    close(weighted_mean, [0.923401])
    close(cross_entropy(Z[None], LABELS, denominator=IMAGES, weight_C=weight_C), [1.151134])  # the frequent mistake


def test_ldam_is_the_published_loss():
    margin_C = ldam_margins(COUNTS, max_margin=0.5)
    close(margin_C, [0.223607, 0.281171, 0.397635, 0.5])
    close(ldam_loss(30 * COSINES[None], LABELS, margin_C=margin_C, scale=30, denominator=IMAGES), [9.477221])
    images = per_image(lambda z, y: ldam_loss(z, y, margin_C=margin_C, scale=30, denominator=ONE), 30 * COSINES)
    close(images, [0.000001, 19.429064, 9.002599])


@pytest.mark.parametrize(("epoch", "published"), [(1, 9.477221), (160, 9.477221), (161, 11.647861), (200, 11.647861)])
def test_ldam_drw_switches_after_its_epoch(epoch, published):
    objective, progress = LDAM(LDAM.Config(reweight_epoch=160), COUNTS, 1), Progress(epoch, 200)
    loss, terms = objective(30 * COSINES[None], LABELS, StepContext(objective.denominators(LABELS, progress), progress))
    close(loss, published)
    close(terms["ldam"], [published])


def test_ldam_without_a_switch_never_reweights():
    objective, progress = LDAM(LDAM.Config(), COUNTS, 1), Progress(10_000, 10_000)
    loss, _ = objective(30 * COSINES[None], LABELS, StepContext(objective.denominators(LABELS, progress), progress))
    close(loss, 9.477221)


def ldam_in_numpy(cosine_BC, labels, counts, *, beta):
    """Paper's equation for one expert, unscaled cosines, image by image in float64; beta None: unweighted."""
    counts = np.asarray(counts, np.float64)
    margin = counts**-0.25
    margin = 0.5 * margin / margin.max()
    weight = np.ones(len(counts))
    if beta is not None:
        weight = (1 - beta) / (1 - beta**counts)
        weight = len(counts) * weight / weight.sum()
    total = 0.0
    for cosine_C, y in zip(cosine_BC, labels, strict=True):
        scores = 30 * cosine_C
        scores[y] = 30 * (cosine_C[y] - margin[y])
        total += weight[y] * (np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[y])
    return total / weight[labels].sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [None, 0.9999, 0.9])
def test_ldam_equals_the_equation_in_float64(beta, seed):
    """Tolerance 1e-12, except for beta near 1, where the transcription's 1 - beta^n loses digits."""
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-1, 1, size=(9, 6))
    labels, counts = rng.integers(0, 6, size=9), rng.integers(1, 500, size=6)
    config = LDAM.Config() if beta is None else LDAM.Config(reweight_epoch=0, reweight_beta=beta)
    objective, progress = LDAM(config, torch.tensor(counts), 1), Progress(1, 1)
    labels_B = torch.tensor(labels)
    logits_EBC = 30 * torch.tensor(cosines)[None]
    loss, _ = objective(logits_EBC, labels_B, StepContext(objective.denominators(labels_B, progress), progress))
    rel = 1e-10 if beta == 0.9999 else 1e-12
    assert loss.item() == pytest.approx(ldam_in_numpy(cosines, labels, counts, beta=beta), rel=rel)


def test_gradient_of_weighted_ldam_is_the_closed_form():
    """dL/dz_b = w_{y_b} (softmax(z_b - s m on y_b) - onehot(y_b)) / sum of w."""
    logits = (30 * COSINES[None]).double().requires_grad_()
    objective, progress = LDAM(LDAM.Config(reweight_epoch=0), COUNTS, 1), Progress(1, 1)
    objective(logits, LABELS, StepContext(objective.denominators(LABELS, progress), progress))[0].backward()
    onehot = torch.nn.functional.one_hot(LABELS, 4).double()
    weight_B1 = objective.weight_C[LABELS][:, None]
    shifted = logits.detach()[0] - 30 * objective.margin_C * onehot
    expected = weight_B1 * (shifted.softmax(dim=-1) - onehot) / weight_B1.sum()
    torch.testing.assert_close(logits.grad[0], expected, atol=1e-13, rtol=1e-12)
