"""Losses that re-weight images or classes, against numbers of published codes and the papers' equations in NumPy.

Origin of the numbers: official functions on CPU in float32, printed to 6 decimals: the survey's code
(Vanint/Awesome-LongTailed-Learning @ 2c1ad2a) for focal and class-balanced, kaidic/LDAM-DRW @ 2536330 for its focal,
dvlab-research/MiSLAS @ 0fc381e for label-aware smoothing, the official repositories of the distribution-balanced loss,
seesaw (the detection library) and ACSL. Tolerance 2e-6: the last printed decimal and float32 rounding.

Shapes: B images, C classes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.losses.acsl import ACSL, suppression_mask
from experts.losses.balanced_softmax import BalancedSoftmax
from experts.losses.class_balanced import ClassBalanced
from experts.losses.distribution_balanced import (
    Balance,
    DistributionBalanced,
    class_shift,
    distribution_balanced_loss,
    rebalancing_weights,
)
from experts.losses.effective_number import effective_number_weights
from experts.losses.focal import Focal
from experts.losses.label_smoothing import LabelAwareSmoothing, smoothing_factors
from experts.losses.seesaw import Seesaw, seesaw_log_factors
from experts.objective import StepContext
from experts.progress import Progress

COUNTS = torch.tensor([100, 40, 10, 4])
LABELS = torch.tensor([0, 2, 3])
Z = torch.tensor([[2, 0.5, -1, 0], [0.1, 1.2, 0.3, -0.7], [-0.5, 0.4, 0.9, 1.5]])
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def close(found, published, atol=2e-6) -> None:
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), atol=atol, rtol=1e-6)


def loss_of(cls, logits=Z, labels=LABELS, counts=COUNTS, **settings):
    """Return the loss of one expert; the term says the same."""
    objective, now = cls(cls.Config(**settings), counts, 1), Progress(1, 1)
    loss, terms = objective(logits[None], labels, StepContext(objective.denominators(labels, now), now))
    assert torch.equal(terms[objective.config.name], loss.detach().reshape(1))
    return loss


def gradient_of(cls, **settings):
    logits = Z.double().requires_grad_()
    loss_of(cls, logits, **settings).backward()
    return logits.grad


# Focal


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("gamma", "published"), [(3, 0.280226), (2, 0.384384), (1, 0.552822), (0, 0.860007)])
def test_focal_is_the_published_loss(gamma, published, detach):
    close(loss_of(Focal, gamma=gamma, detach=detach), published)


FOCAL_GRADIENTS = [
    (
        {"gamma": 3, "detach": True},
        [
            [-0.002354, 0.001287, 0.000287, 0.000780],
            [0.028389, 0.085285, -0.126430, 0.012756],
            [0.002867, 0.007052, 0.011626, -0.021545],
        ],
    ),
    (
        {"gamma": 1, "detach": True},
        [
            [-0.028014, 0.015311, 0.003416, 0.009287],
            [0.046096, 0.138480, -0.205288, 0.020712],
            [0.011277, 0.027737, 0.045731, -0.084745],
        ],
    ),
    (
        {"gamma": 1, "detach": False},
        [
            [-0.051506, 0.028150, 0.006281, 0.017074],
            [0.065515, 0.196818, -0.291771, 0.029438],
            [0.019057, 0.046873, 0.077280, -0.143210],
        ],
    ),
]


@pytest.mark.parametrize(("settings", "published"), FOCAL_GRADIENTS, ids=str)
def test_focal_has_the_published_gradient(settings, published):
    close(gradient_of(Focal, **settings), published)


def test_focal_of_ldams_code_takes_weights_into_the_probability_where_ours_does_not():
    """Its number, by the equation l = w CE, (1 - exp(-l)) l, is another one than the weighted focal loss."""
    weight_B = effective_number_weights(COUNTS, beta=0.9999)[LABELS].numpy()
    nll_B = -Z.double().log_softmax(-1).numpy()[range(3), LABELS]
    theirs = np.mean((1 - np.exp(-weight_B * nll_B)) * weight_B * nll_B)
    close(theirs, 0.933582)
    assert abs(theirs - np.mean(weight_B * (1 - np.exp(-nll_B)) * nll_B)) > 0.05


def sure(scores, **settings):
    logits = scores.clone().requires_grad_()
    loss = loss_of(Focal, logits, labels=torch.zeros(1, dtype=torch.int64), **settings)
    loss.backward()
    return loss, logits.grad


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_focal_stays_finite_where_an_image_is_scored_with_certainty(scale, gamma, form):
    """1 - p is 0 in float32; a power below 1 of that has no slope."""
    loss, gradient = sure(scale * torch.tensor([[200.0, -200, 0, 0]]), gamma=gamma, form=form, detach=False)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def focal_in_numpy(z, labels, counts, *, form, gamma, alpha=None):
    total = 0.0
    for z_C, y in zip(z, labels, strict=True):
        if form == "softmax":
            p = np.exp(z_C[y]) / np.exp(z_C).sum()
            total += -((1 - p) ** gamma) * np.log(p)
            continue
        for c, score in enumerate(z_C):
            p = sigmoid(score if c == y else -score)
            share = 1 if alpha is None else alpha if c == y else 1 - alpha
            total -= share * (1 - p) ** gamma * np.log(p)
    return total / len(labels)


def class_balanced_in_numpy(z, labels, counts, *, form, beta, gamma=1.0):
    weight = (1 - beta) / (1 - beta ** counts.astype(float))
    weight *= len(counts) / weight.sum()
    total = 0.0
    for z_C, y in zip(z, labels, strict=True):
        p_C = np.exp(z_C) / np.exp(z_C).sum()
        if form == "softmax":
            loss = -np.log(p_C[y])
        elif form == "softmax_bce":
            loss = np.mean([-np.log(p) if c == y else -np.log(1 - p) for c, p in enumerate(p_C)])
        else:
            p_C = sigmoid(np.where(np.arange(len(z_C)) == y, z_C, -z_C))
            loss = -((1 - p_C) ** (gamma if form == "focal" else 0) * np.log(p_C)).sum()
        total += weight[y] * loss
    return total / len(labels)


def seesaw_in_numpy(z, labels, counts, *, p, q, floor):
    total = 0.0
    for z_C, y in zip(z, labels, strict=True):
        sigma = np.exp(z_C) / np.exp(z_C).sum()
        factor = np.ones(len(z_C))
        for c in range(len(z_C)):
            if c != y:
                factor[c] = min(1, counts[c] / counts[y]) ** p * max(1, sigma[c] / max(sigma[y], floor)) ** q
        total -= np.log(np.exp(z_C[y]) / (factor * np.exp(z_C)).sum())
    return total / len(labels)


def acsl_in_numpy(z, labels, counts, *, threshold):
    total = 0.0
    for z_C, y in zip(z, labels, strict=True):
        for c, score in enumerate(z_C):
            if c == y:
                total -= np.log(sigmoid(score))
            elif sigmoid(score) >= threshold:
                total -= np.log(sigmoid(-score))
    return total / len(labels)


def las_in_numpy(z, labels, counts, *, head, tail, over):
    total = 0.0
    for z_C, y in zip(z, labels, strict=True):
        nll = -np.log(np.exp(z_C) / np.exp(z_C).sum())
        x = (counts[y] - counts.min()) / (counts.max() - counts.min())
        eps = tail + (head - tail) * np.sin(np.pi * x / 2)
        target = np.full(len(z_C), eps / len(z_C)) if over == "all" else np.full(len(z_C), eps / (len(z_C) - 1))
        target[y] = target[y] + 1 - eps if over == "all" else 1 - eps
        total += (target * nll).sum()
    return total / len(labels)


def distribution_balanced_in_numpy(z, labels, counts, *, focal, tolerance, over_classes):
    total = 0.0
    for z_C, y in zip(z, labels, strict=True):
        of_image = []
        for c in range(len(z_C)):
            weight = 0.1 + sigmoid(10 * (counts[y] / counts[c] - 0.2))
            score = z_C[c] - np.log(counts.sum() / counts[c] - 1) * 0.05 / tolerance
            if c != y:
                score, weight = tolerance * score, weight / tolerance
            p = sigmoid(score if c == y else -score)
            of_image.append(-(2 * (1 - p) ** 2 if focal else 1) * weight * np.log(p))
        total += np.sum(of_image) if over_classes == "sum" else np.mean(of_image)
    return total / len(labels)


def balanced_softmax_in_numpy(z, labels, counts):
    mass = np.exp(z) * counts
    return -np.mean(np.log(mass[range(len(labels)), labels] / mass.sum(1)))


EQUATIONS = [
    (BalancedSoftmax, balanced_softmax_in_numpy, {}),
    (Focal, focal_in_numpy, {"form": "softmax", "gamma": 3.0}),
    (Focal, focal_in_numpy, {"form": "sigmoid", "gamma": 2.0, "alpha": 0.25}),
    (ClassBalanced, class_balanced_in_numpy, {"form": "softmax", "beta": 0.99}),
    (ClassBalanced, class_balanced_in_numpy, {"form": "sigmoid", "beta": 0.99}),
    (ClassBalanced, class_balanced_in_numpy, {"form": "focal", "beta": 0.9, "gamma": 0.5}),
    (ClassBalanced, class_balanced_in_numpy, {"form": "softmax_bce", "beta": 0.9}),
    (Seesaw, seesaw_in_numpy, {"p": 0.8, "q": 2.0, "floor": 0.01}),
    (Seesaw, seesaw_in_numpy, {"p": 1.5, "q": 0.5, "floor": 0.2}),
    (ACSL, acsl_in_numpy, {"threshold": 0.7}),
    (LabelAwareSmoothing, las_in_numpy, {"head": 0.4, "tail": 0.1, "over": "all"}),
    (LabelAwareSmoothing, las_in_numpy, {"head": 0.3, "tail": 0.0, "over": "others"}),
    (
        DistributionBalanced,
        distribution_balanced_in_numpy,
        {"focal": True, "tolerance": 2.0, "over_classes": "sum"},
    ),
    (
        DistributionBalanced,
        distribution_balanced_in_numpy,
        {"focal": False, "tolerance": 5.0, "over_classes": "mean"},
    ),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("cls", "equation", "settings"), EQUATIONS, ids=lambda part: getattr(part, "__name__", part))
def test_losses_equal_their_equations_in_float64(cls, equation, settings, seed):
    rng = np.random.default_rng(seed)
    z, labels, counts = rng.normal(size=(9, 6)) * 3, rng.integers(0, 6, size=9), rng.integers(1, 500, size=6)
    found = loss_of(cls, torch.tensor(z), torch.tensor(labels), torch.tensor(counts), **settings)
    assert found.item() == pytest.approx(equation(z, labels, counts, **settings), rel=1e-11)


# Balanced softmax


def test_balanced_softmax_is_the_published_loss():
    """jiawei-ren/BalancedMetaSoftmax-Classification @ 34a61e4."""
    close(loss_of(BalancedSoftmax), 1.751670)
    for b, expected in enumerate([0.094987, 2.953496, 2.206528]):
        close(loss_of(BalancedSoftmax, Z[b : b + 1], LABELS[b : b + 1]), expected)


def test_balanced_softmax_gradient_is_the_closed_form():
    """dL/dz = (softmax(z + log n) - onehot) / B."""
    onehot = torch.nn.functional.one_hot(LABELS, 4)
    expected = ((Z.double() + COUNTS.double().log()).softmax(-1) - onehot) / 3
    torch.testing.assert_close(gradient_of(BalancedSoftmax), expected, **EXACT)


# Class-balanced


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({"form": "softmax", "beta": 0.9999}, 1.151134),
        ({"form": "softmax_bce", "beta": 0.9}, 0.427456),
        ({"form": "softmax_bce", "beta": 0.9999}, 0.502424),
        ({"form": "focal", "beta": 0.9, "gamma": 1.0}, 1.802176),
        ({"form": "softmax", "beta": 0.0}, 0.860007),
    ],
    ids=str,
)
def test_class_balanced_is_the_published_loss(settings, published):
    # 4e-6: their 1 - beta^n in float32 loses digits where beta is near 1.
    close(loss_of(ClassBalanced, **settings), published, atol=4e-6)


def test_class_balanced_gradient_of_the_sigmoid_form_is_the_closed_form():
    """dL/dz = v_y (sigmoid(z) - onehot) / B."""
    onehot = torch.nn.functional.one_hot(LABELS, 4)
    weight_B1 = effective_number_weights(COUNTS, beta=0.99)[LABELS][:, None]
    expected = weight_B1 * (Z.double().sigmoid() - onehot) / 3
    torch.testing.assert_close(gradient_of(ClassBalanced, form="sigmoid", beta=0.99), expected, **EXACT)


# Distribution-balanced

DB_COUNTS = torch.tensor([80, 15, 5])
DB_TARGET = torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 1, 0]])
DB_Z = torch.tensor([[1, 0, -1], [0.5, 0, 0], [1, -1, 2]])
DB = Balance()


def test_distribution_balanced_is_the_published_loss_of_images_with_several_classes():
    shift_C = class_shift(DB_COUNTS, DB)
    close(shift_C, [0.034657, -0.043365, -0.073611])
    close(
        rebalancing_weights(DB_TARGET, DB_COUNTS, DB),
        [[1.099665, 1.1, 1.1], [0.301813, 0.891392, 1.099665], [0.496265, 1.098376, 1.1]],
    )
    plain, focal = (
        distribution_balanced_loss(DB_Z[None], DB_TARGET, counts_C=DB_COUNTS, shift_C=shift_C, balance=DB, focal=focal)[
            0
        ]
        for focal in (False, True)
    )
    close(plain.mean(), 0.645704)
    close(
        focal,
        [[0.045968, 0.163774, 0.001329], [0.228229, 0.132715, 0.431825], [0.020745, 1.615942, 4.085903]],
    )


# Seesaw

SEESAW_Z = torch.tensor([[2.0, 1, 0], [0, 1, 0.5], [1, 0, 2]])
SEESAW_COUNTS, SEESAW_LABELS = torch.tensor([100, 10, 1]), torch.tensor([0, 0, 2])


def test_seesaw_factors_are_the_published_ones():
    log_s = seesaw_log_factors(
        SEESAW_Z[None], SEESAW_LABELS, log_counts_C=SEESAW_COUNTS.double().log(), p=0.8, q=2, floor=0.01
    )
    close(log_s[0].exp(), [[1, 0.158489, 0.025119], [1, 1.171086, 0.068280], [1, 1, 1]])


@pytest.mark.parametrize(
    ("p", "q", "images", "mean"),
    [
        (0.8, 2, [0.059876, 1.457665, 0.407606], 0.641716),
        (0.8, 0, [0.059876, 0.386780, 0.407606], 0.284754),
        (0, 2, [0.407606, 3.241311, 0.407606], 1.352174),
        (0, 0, [0.407606, 1.680270, 0.407606], 0.831827),
    ],
)
def test_seesaw_is_the_published_loss(p, q, images, mean):
    close(loss_of(Seesaw, SEESAW_Z, SEESAW_LABELS, SEESAW_COUNTS, p=p, q=q), mean)
    for b, expected in enumerate(images):
        close(loss_of(Seesaw, SEESAW_Z[b : b + 1], SEESAW_LABELS[b : b + 1], SEESAW_COUNTS, p=p, q=q), expected)


def test_seesaw_gradient_is_that_of_cross_entropy_on_shifted_scores():
    log_s = seesaw_log_factors(Z.double()[None], LABELS, log_counts_C=COUNTS.double().log(), p=0.8, q=2, floor=0.01)[0]
    onehot = torch.nn.functional.one_hot(LABELS, 4)
    torch.testing.assert_close(gradient_of(Seesaw), ((Z.double() + log_s).softmax(-1) - onehot) / 3, **EXACT)


# ACSL


def test_acsl_is_the_published_loss():
    """Column 0 was the background, which no image here passes the threshold for."""
    logits = torch.tensor([[-2, 2, 0.5, 1], [-2, -1, 1.5, 0]])
    labels, target = torch.tensor([1, 3]), torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    assert suppression_mask(logits, target, threshold=0.7).tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    close(loss_of(ACSL, logits, labels), 1.917375)


# Label-aware smoothing


@pytest.mark.parametrize(
    ("shape", "factors", "published"),
    [
        ("concave", [0.4, 0.266671, 0.129405, 0.1], 1.110742),
        ("linear", [0.4, 0.2125, 0.11875, 0.1], 1.110476),
        ("convex", [0.4, 0.150559, 0.101445, 0.1], 1.110044),
        ("exp", [0.4, 0.142188, 0.101172, 0.1], None),
    ],
)
def test_label_aware_smoothing_is_the_published_loss(shape, factors, published):
    close(smoothing_factors(COUNTS, head=0.4, tail=0.1, shape=shape), factors)
    if published is not None:
        close(loss_of(LabelAwareSmoothing, head=0.4, tail=0.1, shape=shape), published)


def test_label_aware_smoothing_of_the_paper_spares_the_label():
    close(loss_of(LabelAwareSmoothing, head=0.4, tail=0.1, over="others"), 1.194321)


def test_label_aware_smoothing_gradient_is_the_closed_form():
    """dL/dz = (softmax(z) - (1 - eps) onehot - eps / C) / B."""
    eps_B1 = smoothing_factors(COUNTS, head=0.4, tail=0.1, shape="concave")[LABELS][:, None]
    target = (1 - eps_B1) * torch.nn.functional.one_hot(LABELS, 4) + eps_B1 / 4
    expected = (Z.double().softmax(-1) - target) / 3
    torch.testing.assert_close(gradient_of(LabelAwareSmoothing, head=0.4, tail=0.1), expected, **EXACT)


def test_equal_counts_are_smoothed_as_the_most_frequent_class():
    close(smoothing_factors(torch.tensor([7, 7, 7]), head=0.3, tail=0.0, shape="concave"), [0.3, 0.3, 0.3])


# What all of them must have


@pytest.mark.parametrize(
    "cls", [BalancedSoftmax, Focal, ClassBalanced, Seesaw, ACSL, LabelAwareSmoothing, DistributionBalanced]
)
def test_renaming_classes_changes_nothing(cls):
    order = torch.tensor([2, 0, 3, 1])  # class order[k] gets the name k
    place = order.argsort()
    found = loss_of(cls, Z.double()[:, order], place[LABELS], COUNTS[order])
    torch.testing.assert_close(found, loss_of(cls, Z.double()), **EXACT)


@pytest.mark.parametrize("cls", [ClassBalanced, Seesaw, LabelAwareSmoothing, DistributionBalanced])
def test_a_class_without_an_image_is_refused(cls):
    with pytest.raises(ValueError, match="1 of 4 classes have no training image"):
        cls(cls.Config(), torch.tensor([5, 3, 0, 2]), 1)


BAD = [
    (Focal, {"gamma": -1}, "gamma"),
    (Focal, {"alpha": 0.25}, "alpha = 0.25: form = softmax has none"),
    (Focal, {"form": "hinge"}, "form"),
    (ClassBalanced, {"beta": 1.0}, "beta"),
    (Seesaw, {"floor": 0}, "floor"),
    (ACSL, {"threshold": 1.5}, "threshold"),
    (LabelAwareSmoothing, {"head": 1.0}, "head"),
    (DistributionBalanced, {"tolerance": 0}, "tolerance"),
]


@pytest.mark.parametrize(("cls", "settings", "says"), BAD, ids=str)
def test_settings_out_of_range_are_refused_by_key(cls, settings, says):
    with pytest.raises(ValueError, match=says):
        cls.Config(**settings)
