"""Heads against numbers of published codes, element by element, and against the papers' equations in NumPy.

Origin of the numbers: the classifiers of classifier-balancing @f162ade (tau-normalised, nearest class mean) and
LDAM-DRW @2536330 (cosine) on CPU in float32, printed to 6 decimals. Tolerance 2e-6: the last printed decimal and
float32 rounding.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.heads.ncm import NearestClassMean
from experts.heads.tau_normalised import TauNormalisedHead
from experts.losses.cross_entropy import cross_entropy

X = [[1, 2, 0, -1], [0.5, -0.5, 1.5, 2]]
W = [[0.6, 0.8, 0, 0], [1, 0, 2, 2], [0, -0.5, 0.5, 0.1]]
BIAS = [0.1, -0.2, 0.05]
NCM_FEATURES = [[1, 0, 0, 0], [3, 1, 0, 0], [0, 2, 0, 0], [0, 2, 1, 0], [0, 1, 0, 1], [0, 0, 1, 2]]
NCM_LABELS = [0, 0, 1, 1, 1, 2]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, published) -> None:
    torch.testing.assert_close(found.detach().double(), double(published), atol=2e-6, rtol=1e-6)


def linear(kind, **settings):
    """A head of the published weights, in float64 and evaluation mode."""
    head = kind(kind.Config(**settings), 4, 3).double().eval()
    head.weight.data, head.bias.data = double(W), double(BIAS)
    return head


def fitted(**settings):
    head = NearestClassMean(NearestClassMean.Config(**settings), 4, 3).double().eval()
    head.fit(lambda: [(double(NCM_FEATURES), torch.tensor(NCM_LABELS))], lambda total: total)
    return head


def test_linear_scores_are_the_published_ones():
    close(linear(LinearHead)(double(X)), [[2.3, -1.2, -1.05], [0, 7.3, 1.25]])


def test_cosines_are_the_published_ones():
    head = CosineHead(CosineHead.Config(scale=1), 4, 3).double()
    head.weight.data = double(W).T
    close(head(double(X)), [[0.898146, -0.136083, -0.628828], [-0.038490, 0.962251, 0.646762]])


@pytest.mark.parametrize(
    ("gamma", "published"),
    [
        (0.0, [[2.2, -1, -1.1], [-0.1, 7.5, 1.2]]),
        (0.5, [[2.2, -0.577350, -1.301668], [-0.1, 4.330127, 1.420001]]),
        (0.7, [[2.2, -0.463463, -1.392333], [-0.1, 3.475973, 1.518909]]),
        (1.0, [[2.2, -0.333333, -1.540308], [-0.1, 2.5, 1.680336]]),
        (2.0, [[2.2, -0.111111, -2.156862], [-0.1, 0.833333, 2.352941]]),
    ],
)
def test_tau_normalised_scores_are_the_published_ones(gamma, published):
    close(linear(TauNormalisedHead, gamma=gamma)(double(X)), published)
    chosen = linear(TauNormalisedHead, gamma=None)
    chosen.value = gamma
    close(chosen(double(X)), published)


def test_two_steps_of_a_fine_tuned_linear_head_are_the_published_ones():
    """As DR+MU trains it: learning rate 0.02."""
    head = linear(LinearHead).train()
    sgd = torch.optim.SGD(head.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    steps = [
        (3.058134, [0.100605, -0.210251, 0.059647], [0.994722, 0.004418, 1.985025, 1.980324]),
        (2.980774, [0.101750, -0.229727, 0.077978], [0.984692, 0.012805, 1.956580, 1.942951]),
    ]
    for loss, bias, row in steps:
        sgd.zero_grad()
        value_E = cross_entropy(head(double(X))[None], torch.tensor([0, 2]), denominator=torch.tensor(2.0))
        value_E.sum().backward()
        sgd.step()
        close(value_E, [loss])
        close(head.bias, bias)
        close(head.weight[1], row)


@pytest.mark.parametrize(
    ("features", "means"),
    [
        ("un", [[2, 0.5, 0, 0], [0, 1.666667, 0.333333, 0.333333], [0, 0, 1, 2]]),
        ("l2n", [[0.974342, 0.158114, 0, 0], [0, 0.867178, 0.149071, 0.235702], [0, 0, 0.447214, 0.894427]]),
        (
            "cl2n",
            [
                [0.621561, -0.412082, -0.206532, -0.309798],
                [-0.564921, 0.475991, -0.054539, -0.052300],
                [-0.327693, -0.491539, 0.327693, 0.737309],
            ],
        ),
    ],
)
def test_class_means_are_the_published_ones(features, means):
    head = fitted(features=features)
    close(head.mean_CD, means)
    close(head.mean_D, [0.666667, 1, 0.333333, 0.5] if features == "cl2n" else [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("features", "match", "published"),
    [
        ("un", "euclidean", [[-4.25, -3, -15], [-9.5, -9.083333, -0.75]]),
        ("un", "cosine", [[0.75, 0.75, -0.5], [0.1875, 0.083333, 1.375]]),
        ("l2n", "euclidean", [[-0.920596, -0.606130, -2.730297], [-1.660175, -1.628532, -0.106541]]),
        ("l2n", "cosine", [[0.131718, 0.152956, -0.091287], [0.039271, 0.025155, 0.236682]]),
        ("cl2n", "euclidean", [[-1.342039, -1.138924, -3.949097], [-1.852295, -2.179352, -0.120746]]),
        ("cl2n", "cosine", [[0.044093, 0.051561, -0.243637], [-0.019689, -0.078492, 0.234907]]),
    ],
)
def test_nearest_class_mean_scores_are_the_published_ones(features, match, published):
    close(fitted(features=features, match=match)(double(X)), published)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("features", ["un", "l2n", "cl2n"])
def test_nearest_class_mean_equals_its_definition_in_numpy(features, seed):
    """Image by image in float64. 1e-11: the head expands the square of the distance."""
    rng = np.random.default_rng(seed)
    x, queries = rng.normal(size=(40, 5)) * [5, 1, 1, 0.1, 2], rng.normal(size=(7, 5))
    labels = np.concatenate([np.arange(4), rng.integers(0, 4, size=36)])

    def prepared(v):
        v = v - x.mean(axis=0) if features == "cl2n" else v
        return v if features == "un" else v / np.sqrt((v**2).sum())

    means = [np.mean([prepared(v) for v in x[labels == c]], axis=0) for c in range(4)]
    expected = [[-((prepared(q) - m) ** 2).sum() for m in means] for q in queries]
    head = NearestClassMean(NearestClassMean.Config(features=features), 5, 4).double()
    head.fit(lambda: [(torch.from_numpy(x), torch.from_numpy(labels))], lambda total: total)
    np.testing.assert_allclose(head(torch.from_numpy(queries)).numpy(), expected, atol=1e-11, rtol=1e-11)
