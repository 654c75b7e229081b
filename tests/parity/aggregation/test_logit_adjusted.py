"""Corrections of scores after training against numbers of published code, and UNO-IC's blend in NumPy.

Origin of the numbers: GT-RIPL/UNO-IC @ 6a95f2c and google-research (logit_adjustment) on CPU in float32, printed to 6
decimals. Tolerance 2e-6.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aggregation.aggregator import MeanLogits, MeanProbabilities, Outputs
from aggregation.logit_adjusted import LogitAdjusted, UnoIC
from experts.losses.cross_entropy import CrossEntropy
from experts.losses.distribution_balanced import DistributionBalanced
from experts.losses.focal import Focal
from experts.losses.grw import GeneralisedReweighting
from experts.losses.logit_adjustment import LogitAdjustment
from experts.methods.ldam import LDAM
from experts.methods.tade import TADE
from experts.samplers.capped import Capped
from experts.samplers.class_balanced import ClassBalanced
from experts.samplers.instance_balanced import InstanceBalanced
from experts.samplers.oversampled import Oversampled

TOY = [100, 40, 10, 4], [[2, 0.5, -1, 0], [0.1, 1.2, 0.3, -0.7], [-0.5, 0.4, 0.9, 1.5]]
HAND = [100, 10, 1], [[2, 1, 0], [0, 1, 0.5]]


def corrected(cls, inputs, strength):
    """Scores of one expert."""
    counts, logits = inputs
    rule = cls(cls.Config(**{cls.tuned_key: strength}), torch.tensor(counts), ("expert0",))
    return rule(Outputs(torch.tensor([logits], dtype=torch.float64)))


def close(found, published):
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "tau", "published"),
    [
        (
            TOY,
            1.0,
            [
                [2.431782, 1.848073, 1.734368, 3.650658],
                [0.531782, 2.548073, 3.034368, 2.950658],
                [-0.068218, 1.748073, 3.634367, 5.150658],
            ],
        ),
        (HAND, 0.5, [[2.052180, 2.203473, 2.354765], [0.052180, 2.203473, 2.854765]]),
        (HAND, 1.0, [[2.104360, 3.406945, 4.709530], [0.104360, 3.406945, 5.209530]]),
    ],
)
def test_adjusted_scores_are_the_published_ones(inputs, tau, published):
    close(corrected(LogitAdjusted, inputs, tau), published)


@pytest.mark.parametrize(("tau", "classes"), [(0.5, [0, 1, 3]), (1.0, [3, 2, 3]), (1.5, [3, 3, 3])])
def test_adjusted_predictions_are_the_published_ones(tau, classes):
    assert corrected(LogitAdjusted, TOY, tau).argmax(dim=1).tolist() == classes


@pytest.mark.parametrize(
    ("inputs", "lam", "published"),
    [
        (TOY, 0.0, [[0.710100, 0.158445, 0.035354, 0.096102]]),
        (
            TOY,
            0.5,
            [
                [0.457265, 0.161323, 0.071992, 0.309420],
                [0.084324, 0.400538, 0.325693, 0.189445],
                [0.018296, 0.071151, 0.234617, 0.675936],
            ],
        ),
        (
            TOY,
            1.0,
            [
                [0.183855, 0.102559, 0.091536, 0.622051],
                [0.031291, 0.235011, 0.382194, 0.351503],
                [0.004302, 0.026456, 0.174472, 0.794770],
            ],
        ),
        (
            TOY,
            1.3,
            [
                [0.086101, 0.063225, 0.085531, 0.765142],
                [0.015441, 0.152662, 0.376309, 0.455588],
                [0.001739, 0.014073, 0.140668, 0.843520],
            ],
        ),
        (HAND, 0.0, [[0.665241, 0.244728, 0.090031], [0.186324, 0.506480, 0.307196]]),
        (HAND, 0.5, [[0.284358, 0.330805, 0.384837], [0.038339, 0.329560, 0.632101]]),
        (HAND, 1.0, [[0.054908, 0.201995, 0.743097], [0.005180, 0.140804, 0.854017]]),
        (HAND, 1.4, [[0.010457, 0.096628, 0.892915], [0.000901, 0.061538, 0.937560]]),
    ],
)
def test_imbalance_calibration_gives_the_published_probabilities(inputs, lam, published):
    close(corrected(UnoIC, inputs, lam).softmax(dim=1)[: len(published)], published)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lam", [0.3, 1.0, 1.7])
def test_imbalance_calibration_is_the_blend_of_the_paper(lam, seed):
    """p^(1 - lam) r^lam, normalised, r the normalised p / pi, p of the mean over experts of their logits; float64."""
    rng = np.random.default_rng(seed)
    z, counts = rng.normal(size=(3, 8, 5)) * 3, rng.integers(1, 300, size=5)
    p = np.exp(z.mean(axis=0))
    p /= p.sum(axis=1, keepdims=True)
    r = p / (counts / counts.sum())
    r /= r.sum(axis=1, keepdims=True)
    blend = p ** (1 - lam) * r**lam
    blend /= blend.sum(axis=1, keepdims=True)
    for cls in (UnoIC, LogitAdjusted):
        rule = cls(cls.Config(**{cls.tuned_key: lam}), torch.tensor(counts), ("a", "b", "c"))
        found = rule(Outputs(torch.tensor(z))).softmax(dim=1)
        np.testing.assert_allclose(found.numpy(), blend, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("cls", [LogitAdjusted, UnoIC])
def test_the_training_distribution_is_never_subtracted_where_it_was_not_learnt(cls):
    config = cls.Config()
    config.check_objective(CrossEntropy.Config())
    config.check_objective(LogitAdjustment.Config(tau=0.0))  # plain cross-entropy by another name
    refused = {
        "uniform": (LogitAdjustment.Config(), LDAM.Config()),
        "train, weighted": (GeneralisedReweighting.Config(),),
        "train\\^0.5": (LogitAdjustment.Config(tau=0.5),),
        "train, uniform, inverse": (TADE.Config(),),
    }
    for aims, objectives in refused.items():
        for objective in objectives:
            message = rf"aggregator '{config.name}'.*objective.name = {objective.name} the experts learn: {aims}"
            with pytest.raises(ValueError, match=message):
                config.check_objective(objective)


@pytest.mark.parametrize("cls", [LogitAdjusted, UnoIC, MeanProbabilities])
def test_scores_that_only_rank_are_never_read_as_log_probabilities(cls):
    config = cls.Config()
    config.check_objective(Focal.Config() if cls is MeanProbabilities else CrossEntropy.Config())
    for binary in (Focal.Config(form="sigmoid"), DistributionBalanced.Config()):
        with pytest.raises(ValueError, match=rf"'{config.name}'.*objective.name = {binary.name} only rank"):
            config.check_objective(binary)


@pytest.mark.parametrize("cls", [LogitAdjusted, UnoIC])
def test_a_sampler_that_has_corrected_the_distribution_is_refused(cls):
    cls.Config().check_sampler(InstanceBalanced.Config())
    for sampler in (ClassBalanced.Config(), Oversampled.Config(), Capped.Config(cap=None)):
        with pytest.raises(ValueError, match=rf"aggregator '{cls.Config().name}'.*sampler.name = {sampler.name}"):
            cls.Config().check_sampler(sampler)


def test_a_class_without_an_image_is_refused():
    with pytest.raises(ValueError, match="class 1"):
        LogitAdjusted(LogitAdjusted.Config(), torch.tensor([5, 0]), ("a",))


def test_equal_counts_leave_the_mean_of_the_logits():
    logits_EBC = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.full((4,), 7)
    found = UnoIC(UnoIC.Config(), counts, ("a", "b", "c"))(Outputs(logits_EBC))
    mean = MeanLogits(MeanLogits.Config(), counts, ("a", "b", "c"))(Outputs(logits_EBC))
    torch.testing.assert_close(found.log_softmax(dim=1), mean.log_softmax(dim=1), atol=1e-12, rtol=1e-12)
