"""RIDE's distillation against numbers from the published code, and against the equation in NumPy.

Origin of the numbers: frank-xwang/RIDE-LongTailRecognition @ ab8be5c, `RIDELossWithDistill` on CPU in float32, printed
to 6 decimals. Tolerance: half a unit of the last decimal plus float32 rounding of the published run, 1e-6 relative.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aggregation.distillation import DiVE, EachExpert, MeanLogits, SumLogits, distillation_loss
from experts.losses.balanced_softmax import BalancedSoftmax
from experts.losses.cross_entropy import CrossEntropy
from experts.methods.ride import RIDE
from experts.objective import StepContext
from experts.progress import Progress

COUNTS = torch.tensor([100, 10, 1])
LABELS = torch.tensor([0, 2])
LOGITS = [
    [[2, 0.5, -1], [0.1, 0.3, 0.8]],
    [[1, 1.5, 0], [-0.4, 0.2, 1.1]],
    [[0.3, -0.2, 0.4], [1.2, -0.7, 0.5]],
]
TEACHER = [[1.5, 0, -0.5], [0.2, -0.1, 0.9]]


def close(found, published) -> None:
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), atol=2e-6, rtol=1e-6)


def leaf(dtype=torch.float32):
    return torch.tensor(LOGITS, dtype=dtype, requires_grad=True)


def distilled(distillation, logits, epoch=160, objective=None, teacher=TEACHER):
    objective = objective or RIDE(RIDE.Config(diversity_factor=-0.45, reweight_epoch=160), COUNTS, 3)
    now = Progress(epoch=epoch, epochs=200)
    denominators = objective.denominators(LABELS, now) | distillation.denominators(LABELS)
    loss, _ = objective(logits, LABELS, StepContext(denominators, now))
    return distillation(loss, logits, {"teacher": torch.tensor(teacher)}, denominators, now)


@pytest.mark.parametrize(("epoch", "published"), [(160, 89.170372), (161, 135.161163)])
def test_the_total_is_the_published_one(epoch, published):
    loss, terms = distilled(MeanLogits(MeanLogits.Config()), leaf(), epoch)
    close(loss, published)
    close(terms["distillation"], 0.051601)


def test_the_gradient_is_the_published_one():
    logits = leaf()
    distilled(MeanLogits(MeanLogits.Config()), logits)[0].backward()
    close(logits.grad[0], [[-1.733399, 1.370367, 0.363032], [0.734077, 0.774952, -1.509029]])


def test_counted_once_it_is_a_third_of_the_published_loss_of_three_experts():
    published = leaf(torch.float64)
    once = leaf(torch.float64)
    loss = distilled(MeanLogits(MeanLogits.Config()), published)[0]
    third = distilled(MeanLogits(MeanLogits.Config(repeat=1)), once)[0]
    (loss.backward(), third.backward())
    torch.testing.assert_close(3 * third, loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(3 * once.grad, published.grad, atol=1e-12, rtol=1e-12)


def test_gradient_is_the_closed_form():
    """dL/dz_k = E dRIDE/dz_k + (T / B) (softmax(mean / T) - softmax(teacher / T)), the same second part for all k."""
    with_teacher, without = leaf(torch.float64), leaf(torch.float64)
    distilled(MeanLogits(MeanLogits.Config()), with_teacher)[0].backward()
    distilled(MeanLogits(MeanLogits.Config(weight=0)), without)[0].backward()
    mean = with_teacher.detach().mean(dim=0)
    pull = (mean / 1.5).softmax(dim=1) - (torch.tensor(TEACHER).double() / 1.5).softmax(dim=1)
    expected = (1.5 / 2 * pull).expand(3, -1, -1)
    torch.testing.assert_close(with_teacher.grad - without.grad, expected, atol=1e-12, rtol=1e-12)


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("piece", [MeanLogits, SumLogits, EachExpert])
def test_total_equals_the_equation_in_float64(piece, seed):
    """repeat (CE + weight T^2 (1/B) sum_b KL(teacher || student)), one image at a time; tolerance: order of sums."""
    rng = np.random.default_rng(seed)
    z, teacher, labels = rng.normal(size=(4, 5, 3)) * 3, rng.normal(size=(5, 3)) * 3, rng.integers(0, 3, size=5)
    config = piece.Config(temperature=2.5, weight=0.7, repeat=2)
    students = {MeanLogits: [z.mean(axis=0)], SumLogits: [z.sum(axis=0)], EachExpert: list(z)}[piece]
    expected = 0.0
    for b, y in enumerate(labels):
        expected -= sum(np.log(softmax(z[k, b])[y]) for k in range(4)) / 5
        q = softmax(teacher[b] / 2.5)
        expected += 0.7 * 2.5**2 * sum((q * np.log(q / softmax(s[b] / 2.5))).sum() for s in students) / 5
    labels_B, now = torch.tensor(labels), Progress(1, 1)
    objective, distillation = CrossEntropy(CrossEntropy.Config(), COUNTS, 4), piece(config)
    logits, denominators = torch.tensor(z), objective.denominators(labels_B, now)
    loss, _ = objective(logits, labels_B, StepContext(denominators, now))
    total, _ = distillation(loss, logits, {"any": torch.tensor(teacher)}, denominators, now)
    assert total.item() == pytest.approx(2 * expected, rel=1e-12)


def test_a_single_expert_gives_the_same_by_mean_by_sum_and_by_itself():
    one = leaf(torch.float64)[:1]
    objective = CrossEntropy(CrossEntropy.Config(), COUNTS, 1)
    totals = [
        distilled(piece(piece.Config()), one, objective=objective)[0] for piece in (MeanLogits, SumLogits, EachExpert)
    ]
    assert totals[0] == totals[1] == totals[2]


def test_a_student_that_agrees_with_its_teacher_has_no_term_and_log_probabilities_do_as_scores():
    teacher = torch.tensor(TEACHER, dtype=torch.float64)
    images = torch.tensor(2.0)
    assert distillation_loss(teacher[None], teacher, temperature=1.5, images=images).item() == pytest.approx(
        0, abs=1e-15
    )
    student = leaf(torch.float64)
    losses = [
        distillation_loss(student, t, temperature=1.5, images=images) for t in (teacher, teacher.log_softmax(dim=1))
    ]
    torch.testing.assert_close(*losses, atol=1e-14, rtol=1e-12)


def test_no_gradient_goes_to_the_teacher():
    teacher = torch.tensor(TEACHER, requires_grad=True)
    distillation_loss(leaf(), teacher, temperature=1.5, images=torch.tensor(2.0)).sum().backward()
    assert teacher.grad is None


# DiVE: numbers of a re-implementation that was read (float32, 6 decimals)

DIVE_STUDENT = [[[1.0, 2, 3], [0, 0, 1]]]
DIVE_TEACHER = [[2.0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(("power", "divergence", "published"), [(1.0, 0.710863, 1.360886), (0.5, 0.416228, 1.213569)])
def test_dive_is_the_published_loss(power, divergence, published):
    objective = BalancedSoftmax(BalancedSoftmax.Config(), COUNTS, 1)
    logits = torch.tensor(DIVE_STUDENT)
    loss, terms = distilled(DiVE(DiVE.Config(power=power)), logits, objective=objective, teacher=DIVE_TEACHER)
    close(loss, published)
    close(terms["distillation"], [divergence])
    now = Progress(1, 1)
    close(objective(logits, LABELS, StepContext(objective.denominators(LABELS, now), now))[0], 2.010910)


@pytest.mark.parametrize(
    ("power", "published"),
    [
        (1.0, [[0.448441, 0.321322, 0.230237], [0.368116, 0.263767, 0.368116]]),
        (0.5, [[0.390166, 0.330268, 0.279566], [0.351311, 0.297378, 0.351311]]),
    ],
)
def test_dives_virtual_examples_are_the_published_ones(power, published):
    close((DiVE(DiVE.Config(power=power)).teacher_scores(torch.tensor(DIVE_TEACHER)) / 3).softmax(dim=-1), published)


@pytest.mark.parametrize("seed", range(2))
def test_dive_equals_its_equation_in_float64_for_every_expert(seed):
    rng = np.random.default_rng(seed)
    z, t, counts = rng.normal(size=(2, 5, 3)) * 3, rng.normal(size=(5, 3)) * 3, np.array([100, 10, 1])
    labels = rng.integers(0, 3, size=5)
    objective, now, labels_B = (
        BalancedSoftmax(BalancedSoftmax.Config(), COUNTS, 2),
        Progress(1, 1),
        torch.tensor(labels),
    )
    denominators = objective.denominators(labels_B, now)
    loss, _ = objective(torch.tensor(z), labels_B, StepContext(denominators, now))
    piece = DiVE(DiVE.Config(temperature=2.5, alpha=0.3, power=0.7))
    found, _ = piece(loss, torch.tensor(z), {"teacher": torch.tensor(t)}, denominators, now)
    virtual = (np.exp(t / 2.5) / np.exp(t / 2.5).sum(1, keepdims=True)) ** 0.7
    virtual /= virtual.sum(1, keepdims=True)
    expected = 0.0
    for z_BC in z:
        mass = np.exp(z_BC) * counts
        expected -= 0.7 * np.mean(np.log(mass[range(5), labels] / mass.sum(1)))
        student = np.exp(z_BC / 2.5) / np.exp(z_BC / 2.5).sum(1, keepdims=True)
        expected += 0.3 * 2.5**2 * np.mean((virtual * np.log(virtual / student)).sum(1))
    assert found.item() == pytest.approx(expected, rel=1e-12)
