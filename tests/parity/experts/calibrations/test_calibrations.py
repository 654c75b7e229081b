"""Calibrations against numbers of published code, element by element, and against the papers' equations in NumPy.

Origin of the numbers: learnable weight scaling of classifier-balancing @f162ade on CPU in float32, printed to 6
decimals; for DisAlign its formulas, evaluated. Tolerance 2e-6: the last printed decimal and float32 rounding.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.calibrations.calibration import put_on
from experts.calibrations.disalign import DisAlign
from experts.calibrations.scales import Scales
from experts.heads.linear import LinearHead
from experts.losses.cross_entropy import cross_entropy

X = [[1, 2, 0, -1], [0.5, -0.5, 1.5, 2]]
W = [[0.6, 0.8, 0, 0], [1, 0, 2, 2], [0, -0.5, 0.5, 0.1]]
BIAS = [0.1, -0.2, 0.05]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, published) -> None:
    torch.testing.assert_close(found.detach().double(), double(published), atol=2e-6, rtol=1e-6)


def calibrated(config, kind):
    """A linear head of the published weights with a calibration, in float64."""
    head = LinearHead(LinearHead.Config(), 4, 3)
    put_on(head, kind(config, 4, 3))
    head.double().weight.data, head.bias.data = double(W), double(BIAS)
    return head


def test_scaled_scores_are_the_published_ones():
    head = calibrated(Scales.Config(), Scales)
    close(head(double(X)), [[2.3, -1.2, -1.05], [0, 7.3, 1.25]])
    head.calibration.scale_C.data = double([1, 0.5, 2])
    close(head(double(X)), [[2.3, -0.6, -2.1], [0, 3.65, 2.5]])


def test_two_steps_of_learnable_weight_scaling_are_the_published_ones():
    """SGD with momentum 0.9, learning rate 0.2, weight decay 5e-4 on the factors alone, which may turn negative."""
    head = calibrated(Scales.Config(), Scales)
    sgd = torch.optim.SGD(head.calibration.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    steps = [(3.058134, [1.013995, 0.275509, 1.128064]), (0.607970, [1.047293, -0.802951, 1.330307])]
    for loss, scale in steps:
        sgd.zero_grad()
        value_E = cross_entropy(head(double(X))[None], torch.tensor([0, 2]), denominator=torch.tensor(2.0))
        value_E.sum().backward()
        sgd.step()
        close(value_E, [loss])
        close(head.calibration.scale_C, scale)


ALPHA, BETA, CONFIDENCE = [0.5, -0.2, 1], [0.1, 0.3, -0.4], [0.2, -0.1, 0.3, 0]


def disalign(form, alpha, beta, weight, bias):
    head = calibrated(DisAlign.Config(form=form), DisAlign)
    part = head.calibration
    part.alpha_C.data, part.beta_C.data = double(alpha), double(beta)
    part.confidence_weight_D.data, part.confidence_bias.data = double(weight), double([bias])
    return head


def test_disalign_starts_from_ones_zeros_and_a_tenth():
    part = DisAlign(DisAlign.Config(), 4, 3)
    assert part.alpha_C.tolist() == [1, 1, 1]
    assert part.beta_C.tolist() == [0, 0, 0]
    assert torch.equal(part.confidence_weight_D, torch.full((4,), 0.1))
    assert abs(part.confidence_bias.item()) <= 0.5


@pytest.mark.parametrize(
    ("form", "numbers", "published"),
    [
        (
            "published",
            ([1] * 3, [0] * 3, [0.1] * 4, 0),
            [[3.564618, -1.859801, -1.627326], [0, 11.582309, 1.983272]],
        ),
        (
            "published",
            (ALPHA, BETA, CONFIDENCE, 0.1),
            [[2.956224, -0.916511, -1.811220], [0.066819, 6.524902, 1.817960]],
        ),
        ("paper", ([1] * 3, [0] * 3, [0.1] * 4, 0), [[2.3, -1.2, -1.05], [0, 7.3, 1.25]]),
        ("paper", (ALPHA, BETA, CONFIDENCE, 0.1), [[1.748772, -0.286536, -1.259992], [0.066819, 1.647131, 0.982725]]),
    ],
)
def test_calibrated_scores_are_the_published_ones(form, numbers, published):
    close(disalign(form, *numbers)(double(X)), published)


def test_calibration_in_the_papers_form_with_given_confidences():
    """z, confidence logits (0.5, -1) by a feature of that value, alpha and beta; scores are the features' own."""
    head = calibrated(DisAlign.Config(form="paper"), DisAlign)
    head.weight.data = torch.eye(3, 4, dtype=torch.float64)  # the first three features are the scores
    head.bias.data = double([0, 0, 0])
    part = head.calibration
    part.alpha_C.data, part.beta_C.data = double([0.9, 1.1, 1.4]), double([-0.2, 0.1, 0.3])
    part.confidence_weight_D.data, part.confidence_bias.data = double([0, 0, 0, 1]), double([0])
    found = head(double([[2, 1, 0, 0.5], [0, 1, 0.5, -1]]))
    close(found, [[1.751016, 1.124492, 0.186738], [-0.053788, 1.053788, 0.634471]])


@pytest.mark.parametrize("form", ["published", "paper"])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_equals_its_equation_in_numpy(form, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = rng.normal(size=(5, 4)), rng.normal(size=(3, 4)), rng.normal(size=3)
    alpha, beta, u, c = rng.normal(size=3), rng.normal(size=3), rng.normal(size=4), rng.normal()
    head = disalign(form, alpha.tolist(), beta.tolist(), u.tolist(), float(c))
    head.weight.data, head.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
    z, s = x @ weight.T + bias, 1 / (1 + np.exp(-(x @ u + c)))[:, None]
    expected = (1 + s * alpha) * z + s * beta if form == "published" else s * (alpha * z + beta) + (1 - s) * z
    np.testing.assert_allclose(head(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-12, rtol=1e-12)
