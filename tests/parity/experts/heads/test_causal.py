"""The causal head against numbers of published code, element by element, and its moving sum over several steps.

Origin of the numbers: the causal classifier of Long-Tailed-Recognition.pytorch on CPU in float32, printed to 6
decimals. Tolerance 2e-6.
"""

from __future__ import annotations

import pytest
import torch

from experts.heads.causal import CausalHead

X = [[1, 2, 0, -1], [0.5, -0.5, 1.5, 2]]
W = [[0.6, 0.8, 0, 0], [1, 0, 2, 2], [0, -0.5, 0.5, 0.1]]
YES, NO = torch.tensor(True), torch.tensor(False)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def head(**settings):
    made = CausalHead(CausalHead.Config(alpha=1.5, **settings), 4, 3).double()
    made.weight.data = double(W)
    made.sum_D.copy_(double([2, 1, 0.5, 1]))
    return made


PUBLISHED = {
    (2, True): [[7.632445, -2.125744, -8.212838], [-1.097087, 13.318487, 10.941744]],
    (2, False): [[-0.693859, -0.380980, 2.036845], [-4.388349, -1.050949, 5.709099]],
    (1, True): [[13.934875, -2.154877, -9.639441], [-0.597179, 15.237286, 9.914348]],
    (1, False): [[4.813866, -9.912436, -8.693022], [-9.913163, 7.313897, 10.880997]],
}


@pytest.mark.parametrize(("groups", "training"), PUBLISHED)
def test_scores_are_those_of_the_published_code(groups, training):
    found = head(groups=groups).train(training)(double(X))
    torch.testing.assert_close(found, double(PUBLISHED[groups, training]), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_without_a_common_direction_evaluation_is_training(groups):
    """Before the first step, or with alpha 0."""
    trained = head(groups=groups).train()(double(X))
    fresh = head(groups=groups).eval()
    fresh.sum_D.zero_()
    torch.testing.assert_close(fresh(double(X)), trained)


def test_the_sum_follows_the_mean_features_of_batches():
    made = CausalHead(CausalHead.Config(momentum=0.9), 2, 3).double()
    for mean, expected in (([1, 2], [1, 2]), ([3, 0], [3.9, 1.8])):
        made.follow(double(mean), 0.1, YES)
        torch.testing.assert_close(made.sum_D, double(expected))
    made.follow(double([float("nan"), 0]), 0.1, NO)
    torch.testing.assert_close(made.sum_D, double([3.9, 1.8]))


@pytest.mark.parametrize(("lr", "kept"), [(0.2, 0.9), (0.02, 0.9), (0.01, 0.95), (0, 1)])
def test_without_a_momentum_it_follows_the_learning_rate(lr, kept):
    made = CausalHead(CausalHead.Config(), 2, 3).double()
    made.sum_D.fill_(1)
    made.follow(double([1, 2]), lr, YES)
    torch.testing.assert_close(made.sum_D, double([1 + kept, 2 + kept]))


def test_groups_that_do_not_divide_the_features_are_refused():
    with pytest.raises(ValueError, match=r"head.groups = 3 does not divide the 4 features"):
        CausalHead(CausalHead.Config(groups=3), 4, 3)
