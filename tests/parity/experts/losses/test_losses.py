"""Losses and class weights against numbers from published codes, and against the papers' equations in NumPy.

Origin of the numbers: official functions on CPU in float32, printed to 6 decimals; torch for cross-entropy,
kaidic/LDAM-DRW @ 2536330 for weights and LDAM, google-research (logit_adjustment) for logit adjustment,
Megvii-BaseDetection/DisAlign @ a2fc350 for generalised re-weighting, jiawei-ren/BalancedMetaSoftmax-Classification
@ 34a61e4 for balanced softmax; those for counts 100, 10, 1 are by hand. Tolerance 2e-6: the last printed decimal and
float32 rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.losses.class_weights import power_weights
from experts.losses.counts import log_prior
from experts.losses.cross_entropy import CrossEntropy, cross_entropy
from experts.losses.effective_number import effective_number_weights
from experts.losses.grw import GeneralisedReweighting
from experts.losses.ldam import ldam_loss, ldam_margins
from experts.losses.logit_adjustment import LogitAdjustment
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


# Logit adjustment and generalised re-weighting

HAND_COUNTS, HAND_LABELS = torch.tensor([100, 10, 1]), torch.tensor([2, 0])
HAND_Z = torch.tensor([[2.0, 1, 0], [0, 1, 0.5]])


def objective_loss(objective, logits_EBC, labels_B):
    progress = Progress(1, 1)
    return objective(logits_EBC, labels_B, StepContext(objective.denominators(labels_B, progress), progress))


@pytest.mark.parametrize(("tau", "published"), [(0.0, 0.860007), (0.5, 1.205657), (1.0, 1.751670), (1.5, 2.440577)])
def test_logit_adjustment_is_the_published_loss(tau, published):
    loss, terms = objective_loss(LogitAdjustment(LogitAdjustment.Config(tau=tau), COUNTS, 1), Z[None], LABELS)
    close(loss, published)
    close(terms["logit_adjustment"], [published])


def test_at_strength_one_it_is_the_published_balanced_softmax():
    objective = LogitAdjustment(LogitAdjustment.Config(tau=1.0), COUNTS, 1)
    for b, expected in enumerate([0.094987, 2.953496, 2.206528]):
        close(objective_loss(objective, Z[None, b : b + 1], LABELS[b : b + 1])[0], expected)


@pytest.mark.parametrize(
    ("tau", "published"), [(0.5, [4.424685, 0.705307]), (1.0, [6.642602, 0.253335]), (1.5, [8.919456, 0.083981])]
)
def test_logit_adjustment_of_single_images_by_hand(tau, published):
    objective = LogitAdjustment(LogitAdjustment.Config(tau=tau), HAND_COUNTS, 1)
    for b, expected in enumerate(published):
        close(objective_loss(objective, HAND_Z[None, b : b + 1], HAND_LABELS[b : b + 1])[0], expected)


@pytest.mark.parametrize(
    ("counts", "rho", "published"),
    [
        (COUNTS, 1.2, [0.059309, 0.178095, 0.939988, 2.822608]),
        (COUNTS, 1.0, [0.103896, 0.259740, 1.038961, 2.597403]),
        (COUNTS, 0.5, [0.372321, 0.588691, 1.177383, 1.861605]),
        (COUNTS, 0.0, [1.0, 1.0, 1.0, 1.0]),
        (HAND_COUNTS, 0.3, [0.430025, 0.858013, 1.711961]),
        (HAND_COUNTS, 1.2, [0.011192, 0.177389, 2.811419]),
    ],
)
def test_generalised_weights_are_the_published_ones(counts, rho, published):
    close(power_weights(counts, rho=rho), published)


def test_generalised_reweighting_is_the_published_loss():
    loss, terms = objective_loss(GeneralisedReweighting(GeneralisedReweighting.Config(), COUNTS, 1), Z[None], LABELS)
    close(loss, 0.901271)
    close(terms["grw"], [0.901271])


def test_generalised_reweighting_of_calibrated_scores_by_hand():
    """DisAlign's scores in the paper's form; weighted per image, and the weighted mean."""
    calibrated = torch.tensor([[1.751016, 1.124492, 0.186738], [-0.053788, 1.053788, 0.634471]], dtype=torch.float64)
    weight_C = power_weights(HAND_COUNTS, rho=1.2)
    for b, expected in enumerate([5.960994, 0.020086]):
        image = calibrated[None, b : b + 1], HAND_LABELS[b : b + 1]
        close(cross_entropy(*image, denominator=ONE, weight_C=weight_C), [expected], atol=4e-6)
    objective = GeneralisedReweighting(GeneralisedReweighting.Config(), HAND_COUNTS, 1)
    close(objective_loss(objective, calibrated[None], HAND_LABELS)[0], 2.118988)


def logit_adjustment_in_numpy(z, labels, counts, tau):
    """Image by image: -log of exp(z_y) pi_y^tau / sum_c exp(z_c) pi_c^tau."""
    prior = counts / counts.sum()
    losses = []
    for z_C, y in zip(z, labels, strict=True):
        mass_C = np.exp(z_C) * prior**tau
        losses.append(-np.log(mass_C[y] / mass_C.sum()))
    return np.mean(losses)


def grw_in_numpy(z, labels, counts, rho):
    weight = (counts / counts.sum()) ** -rho
    weight = len(counts) * weight / weight.sum()
    total = 0.0
    for z_C, y in zip(z, labels, strict=True):
        total -= weight[y] * np.log(np.exp(z_C[y]) / np.exp(z_C).sum())
    return total / weight[labels].sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.2])
def test_prior_losses_equal_their_equations_in_float64(strength, seed):
    rng = np.random.default_rng(seed)
    z, labels, counts = rng.normal(size=(9, 6)) * 4, rng.integers(0, 6, size=9), rng.integers(1, 500, size=6)
    labels_B, counts_C, z_EBC = torch.tensor(labels), torch.tensor(counts), torch.tensor(z)[None]
    adjusted = LogitAdjustment(LogitAdjustment.Config(tau=strength), counts_C, 1)
    weighted = GeneralisedReweighting(GeneralisedReweighting.Config(rho=strength), counts_C, 1)
    expected = logit_adjustment_in_numpy(z, labels, counts, strength)
    assert objective_loss(adjusted, z_EBC, labels_B)[0].item() == pytest.approx(expected, rel=1e-12)
    expected = grw_in_numpy(z, labels, counts, strength)
    assert objective_loss(weighted, z_EBC, labels_B)[0].item() == pytest.approx(expected, rel=1e-12)


def test_gradients_of_the_prior_losses_are_the_closed_forms():
    """Logit adjustment: (softmax(z + tau log pi) - onehot) / B. Re-weighting: w_y (softmax(z) - onehot) / sum of w."""
    onehot = torch.nn.functional.one_hot(LABELS, 4).double()
    z = Z[None].double().requires_grad_()
    objective_loss(LogitAdjustment(LogitAdjustment.Config(tau=1.5), COUNTS, 1), z, LABELS)[0].backward()
    prior_C = COUNTS.double() / COUNTS.sum()
    expected = ((Z.double() + 1.5 * prior_C.log()).softmax(dim=-1) - onehot) / 3
    torch.testing.assert_close(z.grad[0], expected, atol=1e-13, rtol=1e-12)

    z = Z[None].double().requires_grad_()
    objective_loss(GeneralisedReweighting(GeneralisedReweighting.Config(rho=1.0), COUNTS, 1), z, LABELS)[0].backward()
    weight_B1 = (1 / COUNTS.double())[LABELS][:, None]
    expected = weight_B1 * (Z.double().softmax(dim=-1) - onehot) / weight_B1.sum()
    torch.testing.assert_close(z.grad[0], expected, atol=1e-13, rtol=1e-12)


def test_logit_adjustment_says_what_its_scores_are_trained_for():
    """With strength tau, pi^(1 - tau) is left."""
    log_share_C = log_prior(COUNTS)
    for tau, word in ((1.0, "uniform"), (0.0, "train"), (1.5, "train^-0.5")):
        found_EC, words = LogitAdjustment.Config(tau=tau).trained_log_prior(COUNTS, log_share_C, 2)
        assert words == (word, word)
        torch.testing.assert_close(found_EC, ((1 - tau) * log_share_C).expand(2, -1))
