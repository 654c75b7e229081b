"""Equalization loss against numbers of the survey's and the detection code (CPU, float32, 6 decimals), and in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.losses.equalization import SoftmaxEqualization, rare_classes
from experts.objective import ExtraInputs, StepContext
from experts.progress import Progress

COUNTS, LABELS = torch.tensor([100, 40, 10, 4]), torch.tensor([0, 2, 3])
Z = torch.tensor([[2, 0.5, -1, 0], [0.1, 1.2, 0.3, -0.7], [-0.5, 0.4, 0.9, 1.5]])
DRAWS = torch.tensor([[0.95, 0.2, 0.3, 0.97], [0.1, 0.5, 0.95, 0.92], [0.3, 0.99, 0.2, 0.1]])


def loss_of(logits, labels, counts, uniforms=None, **settings):
    objective, now = SoftmaxEqualization(SoftmaxEqualization.Config(**settings), counts, len(logits)), Progress(1, 1)
    extra = ExtraInputs(draws=None if uniforms is None else lambda what, width: uniforms)
    return objective(logits, labels, StepContext(objective.denominators(labels, now), now, extra))[0]


@pytest.mark.parametrize(
    ("gamma", "uniforms", "published"),
    [(1.0, DRAWS, 0.679673), (0.0, DRAWS, 0.860007), (0.9, DRAWS, 0.742150)],
    ids=["always", "never", "by the draws"],
)
def test_the_softmax_form_is_the_published_loss(gamma, uniforms, published):
    """Classes 2 and 3 are rare."""
    found = loss_of(Z[None], LABELS, COUNTS, uniforms, gamma=gamma, threshold=0.1)
    assert found.item() == pytest.approx(published, abs=2e-6)


@pytest.mark.parametrize(
    ("labels", "gamma", "published"),
    [([0, 1], 1.0, 0.313262), ([0, 2], 1.0, 0.746766), ([0, 1], 0.0, 0.543938), ([0, 2], 0.0, 0.793938)],
)
def test_the_softmax_form_is_the_published_loss_of_three_classes(labels, gamma, published):
    z, draws = torch.tensor([[[2.0, 1, 0], [0, 1, 0.5]]]), torch.full((2, 3), 0.5)
    found = loss_of(z, torch.tensor(labels), torch.tensor([100, 10, 1]), draws, gamma=gamma, threshold=0.01)
    assert found.item() == pytest.approx(published, abs=2e-6)


@pytest.mark.parametrize(("threshold", "published"), [(0.00177, 1.635886), (0.0, 1.792517)])
def test_the_sigmoid_form_is_the_published_loss_of_detection(threshold, published):
    """Without a rare class it is plain binary cross-entropy, summed over classes. Nothing is drawn."""
    z = torch.tensor([[[1, 0, -1], [0.5, 0, 0.2]]])
    found = loss_of(z, torch.tensor([0, 2]), torch.tensor([800, 199, 1]), form="sigmoid", threshold=threshold)
    assert found.item() == pytest.approx(published, abs=2e-6)


def test_a_class_is_rare_up_to_its_threshold():
    assert rare_classes(COUNTS, 10 / 154).tolist() == [False, False, True, True]
    assert rare_classes(COUNTS, None).tolist() == [False, False, True, True]  # 1/8 of the images
    assert rare_classes(torch.tensor([5, 5, 5]), None).tolist() == [False, False, False]


def test_without_draws_the_loss_says_what_is_missing():
    with pytest.raises(ValueError, match=r"draws mask/0 for every image, and only a training step has draws"):
        loss_of(Z[None], LABELS, COUNTS)


@pytest.mark.parametrize("seed", range(3))
def test_the_softmax_form_equals_its_equation_in_float64_for_every_expert(seed):
    rng = np.random.default_rng(seed)
    z, labels, counts = rng.normal(size=(2, 9, 6)) * 3, rng.integers(0, 6, size=9), rng.integers(1, 500, size=6)
    draws, share, expected = rng.uniform(size=(9, 6)), counts / counts.sum(), 0.0
    for z_BC in z:
        for b, y in enumerate(labels):
            kept = [c for c in range(6) if c == y or share[c] > 0.1 or draws[b, c] > 0.7]
            expected -= np.log(np.exp(z_BC[b, y]) / np.exp(z_BC[b, kept]).sum()) / 9
    tensors = torch.tensor(z), torch.tensor(labels), torch.tensor(counts), torch.tensor(draws)
    assert loss_of(*tensors, gamma=0.7, threshold=0.1).item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_is_that_of_a_softmax_over_the_classes_that_count():
    z = Z.double()[None].requires_grad_()
    loss_of(z, LABELS, COUNTS, DRAWS.double(), gamma=0.9, threshold=0.1).backward()
    kept = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1]])  # class 3, rare, is the third image's own
    mass = z.detach()[0].exp() * kept
    onehot = torch.nn.functional.one_hot(LABELS, 4)
    expected = (mass / mass.sum(-1, keepdim=True) - onehot) / 3
    torch.testing.assert_close(z.grad[0], expected, atol=1e-12, rtol=1e-12)
