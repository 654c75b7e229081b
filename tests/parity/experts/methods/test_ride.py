"""RIDE's constants and loss against numbers from the published code, and against a NumPy transcription.

Origin of the numbers: frank-xwang/RIDE-LongTailRecognition @ ab8be5c, `RIDELoss` on CPU in float32, printed to 6
decimals. Tolerance: half a unit of the last printed decimal plus float32 rounding of the published run, 1e-6 relative.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.losses.cross_entropy import CrossEntropy
from experts.methods.ldam import LDAM
from experts.methods.ride import RIDE, class_temperatures
from experts.objective import StepContext
from experts.progress import Progress

COUNTS = torch.tensor([100, 10, 1])
LABELS = torch.tensor([0, 2])
LOGITS = [
    [[2, 0.5, -1], [0.1, 0.3, 0.8]],
    [[1, 1.5, 0], [-0.4, 0.2, 1.1]],
    [[0.3, -0.2, 0.4], [1.2, -0.7, 0.5]],
]


def close(found, published) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.tensor(published, dtype=torch.float64),
        atol=2e-6,
        rtol=1e-6,
    )


def evaluate(objective, logits_EBC, epoch):
    progress = Progress(epoch=epoch, epochs=200)
    return objective(logits_EBC, LABELS, StepContext(objective.denominators(LABELS, progress), progress))


def leaf(dtype=torch.float32):
    return torch.tensor(LOGITS, dtype=dtype, requires_grad=True)


def ride(**settings) -> RIDE:
    return RIDE(RIDE.Config(**{"diversity_factor": -0.45, "reweight_epoch": 160} | settings), COUNTS, 3)


def test_constants_are_the_published_ones():
    objective = ride()
    close(objective.margin_C, [0.158114, 0.281171, 0.5])
    close(objective.weight_C, [0.027159, 0.270369, 2.702472])
    close(objective.temperature_C, [1, 0.887920, 0.876712])
    close(objective.temperature_C.mean(), 0.921544)


@pytest.mark.parametrize(("factor", "published"), [(0.02, [1, 0.952953, 0.948249]), (0.015, [1, 0.964422, 0.960864])])
def test_temperatures_of_the_large_sets(factor, published):
    close(class_temperatures(COUNTS, factor=factor), published)


def test_the_loss_before_reweighting_is_the_published_one():
    logits = leaf()
    loss, terms = evaluate(ride(), logits, epoch=160)
    loss.backward()
    close(loss, 29.671858)
    close(terms["ldam"], [9.287190, 9.993314, 10.562683])
    close(terms["divergence"], [0.100306, 0.097559, 0.182867])
    close(logits.grad[0], [[-0.541557, 0.429332, 0.112225], [0.239286, 0.256690, -0.495976]])
    close(logits.grad[2], [[-0.460702, 0.198575, 0.262127], [0.365593, 0.091273, -0.456866]])


def test_the_loss_after_reweighting_is_the_published_one():
    logits = leaf()
    loss, terms = evaluate(ride(), logits, epoch=161)
    loss.backward()
    close(loss, 45.002121)
    close(terms["ldam"], [14.982505, 14.447062, 15.734385])
    close(terms["divergence"], [0.107201, 0.113063, 0.203198])
    close(logits.grad[0], [[-0.059255, 0.041314, 0.024490], [0.457527, 0.525864, -0.984820]])
    close(logits.grad[1], [[0.032790, -0.046138, 0.008037], [0.381324, 0.631454, -1.016968]])


def test_mean_logits_and_plain_cross_entropy_of_the_published_evaluation():
    mean_BC = leaf().mean(dim=0)
    close(mean_BC.detach(), [[1.1, 0.6, -0.2], [0.3, -0.066667, 0.8]])
    loss, _ = evaluate(CrossEntropy(CrossEntropy.Config(), COUNTS, 1), mean_BC[None], epoch=1)
    close(loss, 0.668636)


def test_published_loss_without_diversity_is_that_of_the_mean_logits():
    loss, _ = evaluate(ride(diversity_factor=0, base_on="published"), leaf(), epoch=160)
    close(loss, 29.476353)


def test_individual_loss_without_diversity_is_the_sum_of_the_ldam_terms():
    loss, _ = evaluate(ride(diversity_factor=0), leaf(), epoch=160)
    close(loss, 9.287190 + 9.993314 + 10.562683)


@pytest.mark.parametrize(("epoch", "published"), [(160, 9.287190), (161, 14.982505)])
def test_ldam_alone_is_the_published_loss(epoch, published):
    objective = LDAM(LDAM.Config(reweight_epoch=160), COUNTS, 1)
    close(evaluate(objective, leaf()[:1], epoch)[0], published)


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def ride_in_numpy(z_EBC, labels, counts, *, late, lambda_, gamma, subtract=False, pairwise=False):
    """The published equations, word for word, one image and one expert at a time, in float64."""
    counts = np.asarray(counts, np.float64)
    classes = len(counts)
    margin = 0.5 * counts**-0.25 / (counts**-0.25).max()
    weight, temperature = np.ones(classes), np.ones(classes)
    if late:
        v = (1 - 0.9999) / (1 - 0.9999**counts)
        weight = classes * v / v.sum()
        u = classes * counts / counts.sum() * gamma + 1 - gamma
        temperature = u + 1 - u.max() if subtract else u / u.max()
    log_q = log_softmax(z_EBC.mean(axis=0) / temperature)
    log_p = log_softmax(z_EBC / temperature)
    loss = 0.0
    for k, z_BC in enumerate(z_EBC):
        shifted = z_BC.copy()
        kl = 0.0
        for b, y in enumerate(labels):
            shifted[b, y] -= 30 * margin[y]
            if pairwise:
                others = [j for j in range(len(z_EBC)) if j != k]
                kl += np.mean([(np.exp(log_p[k, b]) * (log_p[k, b] - log_p[j, b])).sum() for j in others])
            else:
                kl += (np.exp(log_q[b]) * (log_q[b] - log_p[k, b])).sum()
        nll = -log_softmax(shifted)[np.arange(len(labels)), labels]
        loss += (weight[labels] * nll).sum() / weight[labels].sum()
        loss += lambda_ * temperature.mean() ** 2 * kl / len(labels)
    return loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "variant",
    [{}, {"temp_norm": "subtract"}, {"diversity_reference": "pairwise"}],
    ids=["code", "subtract", "pairwise"],
)
def test_loss_equals_the_equations_in_float64(variant, late, seed):
    """Tolerance 1e-12: both sides are float64 and differ in the order of sums only."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, 7, 5)) * 8
    labels, counts = rng.integers(0, 5, size=7), rng.integers(1, 300, size=5)
    objective = RIDE(
        RIDE.Config(diversity_factor=-0.3, reweight_factor=0.07, reweight_epoch=1, **variant), torch.tensor(counts), 4
    )
    progress = Progress(epoch=2 if late else 1, epochs=2)
    labels_B = torch.tensor(labels)
    now = StepContext(objective.denominators(labels_B, progress), progress)
    loss, _ = objective(torch.tensor(logits), labels_B, now)
    expected = ride_in_numpy(
        logits,
        labels,
        counts,
        late=late,
        lambda_=-0.3,
        gamma=0.07,
        subtract="temp_norm" in variant,
        pairwise="diversity_reference" in variant,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_the_closed_form():
    """Before the switch: dL/dz_k = (softmax(z_k - s m_y) - onehot(y)) / B + lambda (softmax(z_k) - q) / B.

    q carries no gradient, so the divergence adds the difference of the two distributions and nothing else.
    """
    logits = leaf(torch.float64)
    evaluate(ride(), logits, epoch=1)[0].backward()
    z = logits.detach()
    onehot = torch.nn.functional.one_hot(LABELS, 3).double()
    margin = 0.5 * COUNTS.double() ** -0.25
    shifted = z - 30 * margin * onehot
    pull = (shifted.softmax(dim=-1) - onehot) / 2
    push = -0.45 * (z.softmax(dim=-1) - z.mean(dim=0).softmax(dim=-1)) / 2
    torch.testing.assert_close(logits.grad, pull + push, atol=1e-12, rtol=1e-12)
