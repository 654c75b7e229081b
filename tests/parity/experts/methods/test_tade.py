"""TADE's offsets and loss against numbers from the published code, and against a NumPy transcription.

Origin of the numbers: Vanint/SADE-AgnosticLT @ cba11b8, `DiverseExpertLoss` and its `inverse_prior` on CPU in float32,
printed to 6 decimals. Tolerance: half a unit of the last printed decimal plus float32 rounding of the published run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.methods.tade import TADE, inverse_counts, tade_offsets
from experts.objective import StepContext
from experts.progress import Progress

COUNTS = torch.tensor([100, 10, 1])
LABELS = torch.tensor([0, 2])
LOGITS = [
    [[2, 0.5, -1], [0.1, 0.3, 0.8]],
    [[1, 1.5, 0], [-0.4, 0.2, 1.1]],
    [[0.3, -0.2, 0.4], [1.2, -0.7, 0.5]],
]
NOW = Progress(epoch=1, epochs=200)


def close(found, published, atol=2e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(published, dtype=torch.float64),
        atol=atol,
        rtol=1e-6,
    )


def evaluate(logits_EBC, labels_B=LABELS, counts_C=COUNTS, **settings):
    objective = TADE(TADE.Config(**settings), counts_C, 3)
    return objective(logits_EBC, labels_B, StepContext(objective.denominators(labels_B, NOW), NOW))


def leaf(dtype=torch.float32):
    return torch.tensor(LOGITS, dtype=dtype, requires_grad=True)


def cifar100_counts(ratio):
    return torch.tensor([int(500 * ratio ** (-c / 99)) for c in range(100)])


def test_offsets_are_the_published_ones():
    offset_EC = tade_offsets(COUNTS, tau=1)
    close(offset_EC[0], [0, 0, 0])
    close(offset_EC[1], [-0.104360, -2.406945, -4.709530])
    close(offset_EC[2], [4.605170, 0, -4.605170])
    close(tade_offsets(COUNTS, tau=2)[2], [9.314700, 2.406945, -4.500810])


@pytest.mark.parametrize(("tau", "inverse", "published"), [(1, 4.959020, 7.184151), (2, 7.258133, 9.483264)])
def test_loss_and_terms_are_the_published_ones(tau, inverse, published):
    loss, terms = evaluate(leaf(), tau=tau)
    close(loss, published)
    close(terms["forward"], 0.492366)
    close(terms["balanced"], 1.732765)
    close(terms["inverse"], inverse)


def test_gradients_are_the_published_ones():
    logits = leaf()
    evaluate(logits, tau=1)[0].backward()
    close(logits.grad[0], [[-0.107201, 0.087645, 0.019556], [0.118059, 0.144198, -0.262258]])
    close(logits.grad[1], [[-0.072120, 0.070546, 0.001574], [0.407488, 0.074249, -0.481738]])
    close(logits.grad[2], [[-0.003069, 0.003014, 0.000055], [0.499228, 0.000747, -0.499975]])


@pytest.mark.parametrize("ties", ["flip", "stable"])
@pytest.mark.parametrize(
    ("counts", "inverse"), [([3, 90, 3, 90, 20], [90, 3, 90, 3, 20]), ([50, 10, 10, 1], [1, 10, 10, 50])]
)
def test_inverse_counts_are_the_published_ones(counts, inverse, ties):
    assert inverse_counts(torch.tensor(counts), ties=ties).tolist() == inverse


@pytest.mark.parametrize(("ties", "inverse"), [("flip", [2, 2, 7, 7, 7]), ("stable", [7, 2, 2, 7, 7])])
def test_ties_can_go_either_way(ties, inverse):
    assert inverse_counts(torch.tensor([7, 7, 7, 2, 2]), ties=ties).tolist() == inverse


def test_cifar100_is_the_counts_backwards():
    counts = cifar100_counts(100)
    assert inverse_counts(counts).tolist() == counts.tolist()[::-1]
    assert inverse_counts(counts)[90:].tolist() == [328, 344, 361, 378, 396, 415, 434, 455, 477, 500]


@pytest.mark.parametrize(("ratio", "moved"), [(10, 0), (50, 16), (100, 24), (200, 30)])
def test_the_tie_rule_matters_for_as_many_classes_of_cifar100_as_published(ratio, moved):
    counts = cifar100_counts(ratio)
    assert (inverse_counts(counts) != inverse_counts(counts, ties="stable")).sum() == moved


def tade_in_numpy(z_EBC, labels, counts, tau):
    """The published equations in float64, one image and one expert at a time; counts without ties."""
    counts = np.asarray(counts, np.float64)
    pi = counts / counts.sum()
    ascending = sorted(range(len(pi)), key=lambda c: pi[c])
    rank = {c: r for r, c in enumerate(ascending)}
    inverse = np.array([pi[ascending[len(pi) - 1 - rank[c]]] for c in range(len(pi))])
    shifts = [0 * pi, np.log(pi + 1e-9), np.log(pi + 1e-9) - tau * np.log(inverse + 1e-9)]
    loss = 0.0
    for z_BC, shift in zip(z_EBC, shifts, strict=True):
        for z, y in zip(z_BC, labels, strict=True):
            s = z + shift
            loss += (np.log(np.exp(s - s.max()).sum()) + s.max() - s[y]) / len(labels)
    return loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", [0, 1, 2.5])
@pytest.mark.parametrize("inverse", ["flip", "stable"])
def test_loss_equals_the_equations_in_float64(inverse, tau, seed):
    """Tolerance 1e-12: both sides are float64 and differ in the order of sums only."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(3, 7, 5)) * 8, rng.integers(0, 5, size=7)
    counts = rng.permutation(300)[:5] + 1
    loss, _ = evaluate(torch.tensor(logits), torch.tensor(labels), torch.tensor(counts), tau=tau, inverse=inverse)
    assert loss.item() == pytest.approx(tade_in_numpy(logits, labels, counts, tau), rel=1e-12)


def test_gradient_is_the_closed_form():
    """dL/dz_k = (softmax(z_k + offset_k) - onehot(y)) / B: terms are summed, not divided by 3."""
    logits = leaf(torch.float64)
    evaluate(logits, tau=2)[0].backward()
    onehot = torch.nn.functional.one_hot(LABELS, 3).double()
    expected = ((logits.detach() + tade_offsets(COUNTS)[:, None]).softmax(dim=-1) - onehot) / 2
    torch.testing.assert_close(logits.grad, expected, atol=1e-12, rtol=1e-12)


def test_without_the_guard_offsets_move_by_no_more_than_its_share_of_the_rarest_class():
    """log(p + g) - log p is nearly g / p: 1e-9 * 111 for the class of one image, tau + 1 times at most."""
    gap = (tade_offsets(COUNTS, log_guard=0.0) - tade_offsets(COUNTS)).abs().max()
    assert 0 < gap < 3 * 1.2e-7


@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_other_numbers_of_experts_are_refused(num_experts):
    with pytest.raises(ValueError, match=rf"'tade': method\.num_experts = {num_experts}; it takes 3"):
        TADE(TADE.Config(), COUNTS, num_experts)


def test_a_class_without_images_is_refused():
    with pytest.raises(ValueError, match=r"1 of 3 classes have no training image \(class 1\)"):
        TADE(TADE.Config(), torch.tensor([5, 0, 1]), 3)
