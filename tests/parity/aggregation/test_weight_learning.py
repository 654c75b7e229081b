"""Test-time weights against numbers from the published scripts, step by step, and against a NumPy transcription.

Origin of the numbers: Vanint/SADE-AgnosticLT @ cba11b8, `test_training` of the CIFAR and of the iNaturalist script, one
batch, on CPU in float32, printed to 6 decimals. Tolerance: half a unit of the last printed decimal plus float32
rounding of the published run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from aggregation.weight_learning import PUBLISHED, Learner, WeightLearning, combine, disagreement

FIRST = [
    [[2, 0.5, -1], [0.1, 0.3, 0.8]],
    [[1, 1.5, 0], [-0.4, 0.2, 1.1]],
    [[0.3, -0.2, 0.4], [1.2, -0.7, 0.5]],
]
SECOND = [
    [[1.6, 0.9, -0.7], [0.4, 0.1, 0.9]],
    [[0.2, 1.9, 0.3], [-0.1, 0.6, 0.7]],
    [[0.9, -0.5, 0.1], [0.2, 0.4, 1.3]],
]
VIEWS = torch.tensor([FIRST, SECOND])
CIFAR = {"lr": 0.1, "weight_decay": 5e-4}
INAT = {"lr": 0.2, "weight_decay": 2e-4, "entropy": 0.01}


def close(found, published) -> None:
    expected = torch.tensor(published, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), expected, atol=1.5e-6, rtol=0)


def gradient(weights_of, entropy=0.0):
    w_E = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
    disagreement(weights_of(w_E), VIEWS, entropy).mean().backward()
    return w_E.grad


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_cosines_are_the_published_ones():
    uniform_E = torch.full((3,), 1 / 3)
    first_BC, second_BC = (combine(uniform_E, view).softmax(dim=1) for view in VIEWS)
    close(cosine_similarity(first_BC, second_BC), [0.985027, 0.986568])
    close(-disagreement(uniform_E, VIEWS), [0.985027, 0.986568])


def test_the_cifar_script_step_by_step():
    close(gradient(lambda w: w.softmax(0)), [-0.003030, 0.007732, -0.004702])
    learner = Learner(3, WeightLearning(**CIFAR))
    losses, after = [], []
    for _ in range(3):
        losses.append(learner.step(VIEWS))
        after.append(learner.numbers_E)
    close(after[0], [0.333877, 0.331833, 0.334195])
    close(after[1], [0.334657, 0.329704, 0.335409])
    close(after[2], [0.335651, 0.327023, 0.336924])
    close(learner.weights_E, [0.334148, 0.331278, 0.334574])
    close(losses[0], -(0.985027 + 0.986568) / 2)
    assert losses[0] > losses[1] > losses[2]


def test_the_inaturalist_script_step_by_step():
    close(gradient(lambda w: w.softmax(0), entropy=0.01), [-0.002817, 0.007648, -0.004831])
    learner = Learner(3, WeightLearning(**INAT))
    after = []
    for _ in range(3):
        learner.step(VIEWS)
        after.append(learner.numbers_E)
    close(after[0], [0.334378, 0.330402, 0.335144])
    close(after[2], [0.337811, 0.321105, 0.340762])


def test_published_settings_are_those_of_the_scripts():
    assert {name: WeightLearning(**values) for name, values in PUBLISHED.items()} == {
        "cifar10_lt": WeightLearning(**CIFAR),
        "cifar100_lt": WeightLearning(**CIFAR),
        "imagenet_lt": WeightLearning(lr=0.025, weight_decay=5e-4),
        "places_lt": WeightLearning(lr=0.01, weight_decay=4e-4),
        "inat18": WeightLearning(**INAT),
    }
    default = WeightLearning()
    assert (default.momentum, default.epochs, default.batch_size, default.stop_below) == (0.9, 5, 128, 0.05)


def loss_and_gradient(w_E, views_2EBC, entropy):
    """The paper's equations and their derivative by hand, image by image, in float64.

    With c = cos(p', p'') and n the norms: dc/dp' = p''/(n'n'') - c p'/n'^2; d(mean p log p)/dp = (log p + 1)/C;
    dp/dz = diag(p) - p p^T; dz/da_k = z_k; da/dw = diag(a) - a a^T.
    """
    a_E = softmax(w_E)
    loss, slope_E = 0.0, np.zeros_like(w_E)
    num_images, num_classes = views_2EBC.shape[2:]
    for b in range(num_images):
        p = [softmax(a_E @ views_2EBC[v, :, b]) for v in range(2)]
        norm = [np.sqrt((q**2).sum()) for q in p]
        cosine = p[0] @ p[1] / (norm[0] * norm[1])
        loss -= cosine
        for v in range(2):
            loss += entropy * (p[v] * np.log(p[v])).mean()
            dp = -(p[1 - v] / (norm[0] * norm[1]) - cosine * p[v] / norm[v] ** 2)
            dp += entropy * (np.log(p[v]) + 1) / num_classes
            slope_E += views_2EBC[v, :, b] @ (p[v] * dp - p[v] * (p[v] @ dp))
    slope_E = a_E * slope_E - a_E * (a_E @ slope_E)
    return loss / num_images, slope_E / num_images


@pytest.mark.parametrize("entropy", [0.0, 0.01, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_twenty_steps_equal_the_equations_in_float64(seed, entropy):
    """Tolerance 1e-12: both sides are float64 and differ in the order of sums only."""
    rng = np.random.default_rng(seed)
    settings = WeightLearning(lr=0.3, weight_decay=0.02, entropy=entropy)
    learner = Learner(4, settings)
    w_E, momentum_E = np.full(4, 0.25), np.zeros(4)
    for _ in range(20):
        views = rng.normal(size=(2, 4, 6, 5)) * 3
        expected, slope_E = loss_and_gradient(w_E, views, entropy)
        slope_E = slope_E + settings.weight_decay * w_E
        momentum_E = settings.momentum * momentum_E + slope_E
        w_E = w_E - settings.lr * (slope_E + settings.momentum * momentum_E)
        assert learner.step(torch.from_numpy(views)) == pytest.approx(expected, abs=1e-12)
        np.testing.assert_allclose(learner.numbers_E.numpy(), w_E, atol=1e-12)
    assert np.abs(w_E - w_E.mean()).max() > 1e-3, "the weights moved"


def test_probabilities_that_vanish_do_no_harm_to_the_entropy():
    views = torch.tensor([[[[2000.0, 0.0, -2000.0]]], [[[1500.0, 0.0, -900.0]]]])
    learner = Learner(1, WeightLearning(entropy=0.01))
    assert learner.step(views) == pytest.approx(-1.0)
    assert torch.isfinite(learner.numbers_E).all()
