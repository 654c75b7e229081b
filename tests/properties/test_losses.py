"""Properties of losses, weights and margins that hold for any numbers: cases are drawn from seeds, not picked by hand.

Shapes: E experts, B images, C classes. Tolerance 1e-12: float64, sums in another order.
"""

from __future__ import annotations

import pytest
import torch

from experts.losses.cross_entropy import CrossEntropy
from experts.losses.effective_number import effective_number_weights
from experts.losses.grw import GeneralisedReweighting, power_weights
from experts.losses.ldam import ldam_margins
from experts.losses.logit_adjustment import LogitAdjustment
from experts.methods.ldam import LDAM
from experts.methods.ride import RIDE, class_temperatures
from experts.objective import StepContext
from experts.progress import Progress

every_seed = pytest.mark.parametrize("seed", range(5))
OBJECTIVES = {
    "cross_entropy": (CrossEntropy, {}),
    "logit_adjustment": (LogitAdjustment, {"tau": 1.3}),
    "grw": (GeneralisedReweighting, {}),
    "ldam": (LDAM, {}),
    "ldam-drw": (LDAM, {"reweight_epoch": 0}),
    "ride": (RIDE, {}),
    "ride-reweighted": (RIDE, {"reweight_epoch": 0}),
    "ride-pairwise": (RIDE, {"reweight_epoch": 0, "diversity_reference": "pairwise", "temp_norm": "subtract"}),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
NOW = Progress(epoch=1, epochs=1)


def draw(seed, num_experts=3, num_images=8, num_classes=6):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_experts, num_images, num_classes, generator=draws, dtype=torch.float64) * 6
    labels = torch.randint(num_classes, (num_images,), generator=draws)
    counts = torch.randint(1, 400, (num_classes,), generator=draws)
    return logits, labels, counts, draws


def loss_of(name, logits_EBC, labels_B, counts_C, **more):
    cls, settings = OBJECTIVES[name]
    objective = cls(cls.Config(**settings, **more), counts_C, len(logits_EBC))
    return objective(logits_EBC, labels_B, StepContext(objective.denominators(labels_B, NOW), NOW))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-12)


@every_objective
@every_seed
def test_renaming_classes_changes_nothing(name, seed):
    logits, labels, counts, draws = draw(seed)
    order = torch.randperm(len(counts), generator=draws)
    renamed = order.argsort()[labels]
    close(loss_of(name, logits[:, :, order], renamed, counts[order])[0], loss_of(name, logits, labels, counts)[0])


@every_objective
@every_seed
def test_reordering_experts_reorders_the_terms_and_keeps_the_loss(name, seed):
    logits, labels, counts, draws = draw(seed)
    order = torch.randperm(len(logits), generator=draws)
    loss, terms = loss_of(name, logits, labels, counts)
    moved_loss, moved_terms = loss_of(name, logits[order], labels, counts)
    close(moved_loss, loss)
    for term, value_E in terms.items():
        close(moved_terms[term], value_E[order])


@every_objective
@every_seed
def test_adding_a_constant_to_an_images_scores_changes_nothing(name, seed):
    """The same constant for every class; RIDE divides by a temperature per class, so only without re-weighting."""
    logits, labels, counts, draws = draw(seed)
    if name in ("ride-reweighted", "ride-pairwise"):
        counts = torch.full_like(counts, 7)
    shift = torch.randn(*logits.shape[:2], 1, generator=draws, dtype=torch.float64) * 10
    close(loss_of(name, logits + shift, labels, counts)[0], loss_of(name, logits, labels, counts)[0])


@every_objective
@every_seed
def test_repeating_every_image_changes_nothing(name, seed):
    logits, labels, counts, _ = draw(seed)
    twice = loss_of(name, logits.repeat(1, 2, 1), labels.repeat(2), counts)[0]
    close(twice, loss_of(name, logits, labels, counts)[0])


@every_seed
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_equal_counts_give_weights_of_one_equal_margins_and_temperatures_of_one(seed, beta):
    count = int(torch.randint(1, 1000, (), generator=torch.Generator().manual_seed(seed)))
    counts, ones = torch.full((7,), count), torch.ones(7, dtype=torch.float64)
    close(effective_number_weights(counts, beta=beta), ones)
    close(ldam_margins(counts, max_margin=0.5), 0.5 * ones)
    close(class_temperatures(counts, factor=0.05), ones)
    close(class_temperatures(counts, factor=0.05, norm="subtract"), ones)


@every_seed
def test_equal_counts_turn_reweighting_off(seed):
    logits, labels, counts, _ = draw(seed)
    counts = torch.full_like(counts, 9)
    close(loss_of("ldam-drw", logits, labels, counts)[0], loss_of("ldam", logits, labels, counts)[0])
    close(loss_of("ride-reweighted", logits, labels, counts)[0], loss_of("ride", logits, labels, counts)[0])
    for name in ("logit_adjustment", "grw"):
        close(loss_of(name, logits, labels, counts)[0], loss_of("cross_entropy", logits, labels, counts)[0])


@every_seed
def test_a_strength_of_zero_is_cross_entropy(seed):
    logits, labels, counts, _ = draw(seed)
    plain = loss_of("cross_entropy", logits, labels, counts)[0]
    for cls, key in ((LogitAdjustment, "tau"), (GeneralisedReweighting, "rho")):
        objective = cls(cls.Config(**{key: 0.0}), counts, len(logits))
        close(objective(logits, labels, StepContext(objective.denominators(labels, NOW), NOW))[0], plain)


@every_seed
def test_scaling_all_counts_keeps_losses_that_know_only_shares(seed):
    logits, labels, counts, _ = draw(seed)
    for name in ("logit_adjustment", "grw"):
        close(loss_of(name, logits, labels, 10 * counts)[0], loss_of(name, logits, labels, counts)[0])


@every_seed
def test_without_margin_and_diversity_all_are_cross_entropy(seed):
    logits, labels, counts, _ = draw(seed)
    plain = loss_of("cross_entropy", logits, labels, counts)[0]
    close(loss_of("ldam", logits, labels, counts, max_margin=0.0)[0], plain)
    close(loss_of("ride", logits, labels, counts, max_margin=0.0, diversity_factor=0.0)[0], plain)


@every_seed
def test_ride_with_one_expert_is_ldam(seed):
    """The divergence from the mean of one is zero, and so is its gradient, to rounding."""
    logits, labels, counts, _ = draw(seed, num_experts=1)
    gradients = []
    for name in ("ride-reweighted", "ride-pairwise", "ldam-drw"):
        leaf = logits.clone().requires_grad_()
        loss, _ = loss_of(name, leaf, labels, counts)
        loss.backward()
        gradients.append(leaf.grad)
        close(loss, loss_of("ldam-drw", logits, labels, counts)[0])
    close(gradients[0], gradients[2])
    close(gradients[1], gradients[2])


@every_seed
def test_the_divergence_is_zero_for_equal_experts_and_positive_otherwise(seed):
    logits, labels, counts, _ = draw(seed)
    for name in ("ride", "ride-reweighted", "ride-pairwise"):
        assert (loss_of(name, logits, labels, counts)[1]["divergence"] > 0).all()
        equal = loss_of(name, logits[:1].expand(3, -1, -1), labels, counts)[1]["divergence"]
        assert equal.abs().max() < 1e-12


@every_seed
def test_scaling_all_counts_keeps_margins_and_temperatures_but_not_class_balanced_weights(seed):
    counts = draw(seed)[2]
    close(ldam_margins(10 * counts, max_margin=0.5), ldam_margins(counts, max_margin=0.5))
    close(class_temperatures(10 * counts, factor=0.05), class_temperatures(counts, factor=0.05))
    weights, scaled = (effective_number_weights(k * counts, beta=0.999) for k in (1, 10))
    assert (weights - scaled).abs().max() > 1e-3


@every_seed
def test_rarer_classes_get_larger_weights_and_margins_and_smaller_temperatures(seed):
    draws = torch.Generator().manual_seed(seed)
    counts = (torch.randperm(5000, generator=draws)[:50] + 1).sort(descending=True).values
    for weight_C in (effective_number_weights(counts, beta=0.9999), power_weights(counts, rho=1.2)):
        assert (weight_C.diff() > 0).all()
        close(weight_C.sum(), torch.tensor(50.0, dtype=torch.float64))
    margin_C = ldam_margins(counts, max_margin=0.3)
    assert (margin_C.diff() > 0).all()
    assert margin_C[-1] == pytest.approx(0.3)
    temperature_C = class_temperatures(counts, factor=0.05)
    assert (temperature_C.diff() < 0).all()
    assert temperature_C[0] == 1
