"""RIDE's distillation against numbers from the published code, and against the equation in NumPy.

Origin of the numbers: frank-xwang/RIDE-LongTailRecognition @ ab8be5c, `RIDELossWithDistill` on CPU in float32, printed
to 6 decimals. Tolerance: half a unit of the last decimal plus float32 rounding of the published run, 1e-6 relative.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aggregation.distillation import EachExpert, MeanLogits, SumLogits, distillation_loss
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
