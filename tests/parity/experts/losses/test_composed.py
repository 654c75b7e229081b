"""Objectives made of others give RIDE and TADE, and class weights any loss: equal to the methods' own to 1e-12."""

from __future__ import annotations

import pytest
import torch

import experts
from experts import registry
from experts.losses.balanced_softmax import BalancedSoftmax
from experts.losses.class_balanced import ClassBalanced
from experts.losses.class_weights import ClassWeights, log_ratio_weights, trained_with
from experts.losses.composed import PerExpert, Sum
from experts.losses.counts import log_prior
from experts.losses.cross_entropy import CrossEntropy
from experts.losses.grw import GeneralisedReweighting
from experts.methods.ldam import LDAM
from experts.methods.ride import RIDE
from experts.methods.tade import TADE, InverseSoftmax
from experts.objective import StepContext
from experts.progress import Progress

registry.import_pieces(experts)  # a part may be any registered objective

COUNTS = torch.tensor([300, 60, 12, 1])
LABELS = torch.tensor([0, 3, 1, 0, 2, 2, 0])
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def result(config, num_experts, epoch=1, weights=None):
    """Return loss, terms and gradient at fixed scores."""
    objective = registry.build("objective", config, COUNTS, num_experts)
    if weights is not None:
        objective.weigh(weights, COUNTS)
    generator = torch.Generator().manual_seed(num_experts)
    logits = (5 * torch.randn(num_experts, len(LABELS), 4, generator=generator, dtype=torch.float64)).requires_grad_()
    now = Progress(epoch, 4)
    loss, terms = objective(logits, LABELS, StepContext(objective.denominators(LABELS, now), now))
    loss.backward()
    return loss, terms, logits.grad


RIDES = [
    ({}, {}),
    ({"reweight_epoch": 2, "reweight_factor": 0.02}, {}),
    ({"reweight_epoch": 0, "base_temperature": 2.0, "temp_norm": "subtract"}, {"reference": "pairwise"}),
]


@pytest.mark.parametrize("num_experts", [2, 3])
@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize(("settings", "more"), RIDES, ids=["plain", "late", "pairwise"])
def test_ride_is_the_sum_of_ldam_and_a_negative_multiple_of_the_divergence(settings, more, epoch, num_experts):
    switch = {"reweight_epoch": settings.get("reweight_epoch")}
    reference = {"diversity_reference": more["reference"]} if more else {}
    loss, terms, gradient = result(RIDE.Config(diversity_factor=-0.45, **settings, **reference), num_experts, epoch)
    parts = {"ldam": {"name": "ldam", **switch}, "divergence": {"name": "expert_divergence", **settings, **more}}
    summed = Sum.Config(terms=parts, weights={"divergence": -0.45})
    found, found_terms, found_gradient = result(summed, num_experts, epoch)
    torch.testing.assert_close(found, loss, **EXACT)
    torch.testing.assert_close(found_gradient, gradient, **EXACT)
    assert found_terms.keys() == {"ldam.ldam", "divergence.divergence"}
    for name in terms:
        torch.testing.assert_close(found_terms[f"{name}.{name}"], terms[name], **EXACT)


@pytest.mark.parametrize("settings", [{}, {"tau": 1.0, "inverse": "stable"}])
def test_tade_is_one_objective_for_each_expert(settings):
    """Without the 1e-9 that TADE's published code adds inside the logs."""
    loss, terms, gradient = result(TADE.Config(log_guard=0.0, **settings), 3)
    config = PerExpert.Config(of=(CrossEntropy.Config(), BalancedSoftmax.Config(), InverseSoftmax.Config(**settings)))
    found, found_terms, found_gradient = result(config, 3)
    torch.testing.assert_close(found, loss, **EXACT)
    torch.testing.assert_close(found_gradient, gradient, **EXACT)
    torch.testing.assert_close(found_terms["per_expert"], torch.stack(list(terms.values())), **EXACT)
    priors, words = TADE.Config(log_guard=0.0, **settings).trained_log_prior(COUNTS, log_prior(COUNTS), 3)
    found_priors, found_words = config.trained_log_prior(COUNTS, log_prior(COUNTS), 3)
    assert found_words == words
    torch.testing.assert_close(found_priors - found_priors.mean(1, True), priors - priors.mean(1, True), **EXACT)


@pytest.mark.parametrize("epoch", [1, 3])
def test_ldam_drw_is_ldam_with_class_weights_bitwise(epoch):
    weights = ClassWeights(rule="effective_number", after_epoch=2)
    own = result(LDAM.Config(reweight_epoch=2), 2, epoch)
    found = result(LDAM.Config(), 2, epoch, weights)
    assert torch.equal(found[0], own[0])
    assert torch.equal(found[2], own[2])
    assert torch.equal(result(LDAM.Config(), 2, 1)[0], result(LDAM.Config(reweight_epoch=2), 2, 1)[0])


def test_class_weights_of_a_sum_reach_the_terms_that_take_them():
    weights = ClassWeights(rule="effective_number")
    parts = {"ldam": {"name": "ldam"}, "divergence": {"name": "expert_divergence"}}
    found = result(Sum.Config(terms=parts, weights={"divergence": -0.45}), 3, 1, weights)
    parts["ldam"]["reweight_epoch"] = 0
    own = result(Sum.Config(terms=parts, weights={"divergence": -0.45}), 3)
    assert torch.equal(found[0], own[0])
    assert torch.equal(found[2], own[2])


Z = torch.tensor([[2, 0.5, -1, 0], [0.1, 1.2, 0.3, -0.7], [-0.5, 0.4, 0.9, 1.5]])


@pytest.mark.parametrize(
    ("weights", "published"),
    [
        ({"rule": "log_ratio"}, 0.982853),
        ({"rule": "effective_number"}, 0.923401),
        ({"rule": "effective_number", "mean": "images"}, 1.151134),
        ({"rule": "power", "power": 1.2}, 0.901271),
        ({"rule": "effective_number", "after_epoch": 1}, 0.860007),
    ],
    ids=str,
)
def test_weighted_cross_entropy_is_the_published_one(weights, published):
    """Weighted softmax: the survey's code; effective numbers: kaidic/LDAM-DRW; powers: DisAlign. Float32."""
    counts, labels, now = torch.tensor([100, 40, 10, 4]), torch.tensor([0, 2, 3]), Progress(1, 4)
    objective = CrossEntropy(CrossEntropy.Config(), counts, 1)
    objective.weigh(ClassWeights(**weights), counts)
    loss, _ = objective(Z[None], labels, StepContext(objective.denominators(labels, now), now))
    assert loss.item() == pytest.approx(published, abs=2e-6)


def test_log_ratio_weights_are_the_published_ones():
    expected = torch.tensor([1.0, 1.916291, 3.302585, 4.218876], dtype=torch.float64)
    torch.testing.assert_close(log_ratio_weights(torch.tensor([100, 40, 10, 4])), expected, atol=1e-6, rtol=0)


def test_cross_entropy_weighted_by_inverse_frequency_learns_a_uniform_distribution():
    [found_C], words = trained_with(ClassWeights(rule="power").of(COUNTS), log_prior(COUNTS), 1)
    torch.testing.assert_close(found_C, found_C.mean().expand(4), **EXACT)
    assert words == ("train, weighted",)


def test_losses_with_weights_of_their_own_learn_what_class_weights_would_teach():
    """The same weights make the same distribution, whichever key sets them; weights of 1 leave that of training."""
    for own, weights in (
        (ClassBalanced.Config(beta=0.9), ClassWeights(rule="effective_number", beta=0.9)),
        (GeneralisedReweighting.Config(rho=0.7), ClassWeights(rule="power", power=0.7)),
    ):
        found, words = own.trained_log_prior(COUNTS, log_prior(COUNTS), 2)
        expected, _ = trained_with(weights.of(COUNTS), log_prior(COUNTS), 2)
        torch.testing.assert_close(found, expected, **EXACT)
        assert words == ("train, weighted",) * 2
    for even in (ClassBalanced.Config(beta=0.0), GeneralisedReweighting.Config(rho=0.0)):
        found, words = even.trained_log_prior(COUNTS, log_prior(COUNTS), 2)
        torch.testing.assert_close(found, log_prior(COUNTS).expand(2, -1), **EXACT)
        assert words == ("train",) * 2


def test_class_weights_that_would_be_zero_in_training_are_refused():
    with pytest.raises(ValueError, match=r"class_weights\.power = 1000: a class of 300 images weighs 0"):
        ClassWeights(rule="power", power=1000.0).of(COUNTS)
    with pytest.raises(ValueError, match=r"objective\.rho = 1000: .*needed a smaller power"):
        GeneralisedReweighting(GeneralisedReweighting.Config(rho=1000.0), COUNTS, 1)


BAD = [
    (Sum.Config, {"terms": {}}, "terms = {}: needed at least one"),
    (Sum.Config, {"terms": {"a.b": {"name": "ldam"}}}, r"terms\.a\.b: needed a name of letters"),
    (Sum.Config, {"weights": {"divergence": -1.0}}, r"weights\.divergence: there is no such term"),
    (Sum.Config, {"weights": {"cross_entropy": 0.0}}, r"weights = .*: all terms count nothing"),
    (
        Sum.Config,
        {"terms": {"a": {"name": "lade"}, "b": {"name": "lfme"}}},
        "needs the whole batch, another teachers",
    ),
    (Sum.Config, {"terms": {"a": {"name": "bbn"}}}, r"terms\.a\.name = bbn: it is for flow 'bilateral'"),
    (PerExpert.Config, {"of": [{"name": "bbn"}]}, r"of\.0\.name = bbn: it is for flow"),
    (ClassWeights, {"rule": "power", "beta": 0.5}, "beta = 0.5: rule 'power' takes power only"),
    (ClassWeights, {"rule": "log_ratio", "power": 2}, "power = 2: rule 'log_ratio' takes no number"),
    (ClassWeights, {"rule": "effective_number", "beta": 1.0}, "beta"),
    (ClassWeights, {"rule": "effective_number", "after_epoch": -1}, "after_epoch"),
]


@pytest.mark.parametrize(("cls", "settings", "says"), BAD, ids=[says[:24] for _, _, says in BAD])
def test_bad_parts_and_weights_are_refused_by_key(cls, settings, says):
    with pytest.raises(ValueError, match=says):
        cls(**settings)


@pytest.mark.parametrize(
    ("config", "num_experts", "says"),
    [
        (PerExpert.Config(of=(LDAM.Config(), LDAM.Config())), 3, r"objective\.of: 2 objectives .*method.num_experts=2"),
        (PerExpert.Config(of=(TADE.Config(),)), 1, "'tade': method.num_experts = 1; it takes"),
        (
            Sum.Config(terms={"a": {"name": "expert_divergence"}}),
            1,
            "'expert_divergence': method.num_experts = 1; it takes 2",
        ),
    ],
)
def test_parts_for_another_number_of_experts_are_refused(config, num_experts, says):
    with pytest.raises(ValueError, match=says):
        registry.build("objective", config, COUNTS, num_experts)


@pytest.mark.parametrize(
    ("config", "num_experts", "says"),
    [
        (
            LDAM.Config(reweight_epoch=3),
            1,
            r"'ldam' has its own; set objective\.reweight_epoch=null, or class_w",
        ),
        (TADE.Config(), 3, "'tade' takes no class weights"),
        (Sum.Config(terms={"a": {"name": "expert_divergence"}}), 2, "does not count by class"),
        (PerExpert.Config(of=(LDAM.Config(), {"name": "grw"})), 2, "'grw' takes no class weights beside its own"),
    ],
)
def test_class_weights_are_refused_where_they_mean_nothing(config, num_experts, says):
    objective = registry.build("objective", config, COUNTS, num_experts)
    with pytest.raises(ValueError, match=says):
        objective.weigh(ClassWeights(rule="power"), COUNTS)


EQUAL = torch.tensor([7, 7, 7, 7])
AS_CROSS_ENTROPY = [
    {"name": "balanced_softmax"},
    {"name": "class_balanced"},
    {"name": "seesaw", "q": 0.0},
    {"name": "las", "head": 0.0, "tail": 0.0},
    {"name": "focal", "gamma": 0.0},
    {"name": "inverse_softmax"},
    {"name": "lade", "alpha": 0.0},
]


def with_counts(config, counts, weights=None):
    """Return the loss of one expert at fixed scores, for other counts."""
    objective, now = registry.build("objective", config, counts, 1), Progress(1, 4)
    if weights is not None:
        objective.weigh(weights, counts)
    return objective(Z.double()[None], LABELS[:3], StepContext(objective.denominators(LABELS[:3], now), now))[0]


@pytest.mark.parametrize("settings", AS_CROSS_ENTROPY, ids=lambda settings: settings["name"])
def test_with_equal_counts_or_strength_zero_they_are_cross_entropy(settings):
    config = registry.piece("objective", settings["name"]).Config(**settings)
    torch.testing.assert_close(with_counts(config, EQUAL), with_counts(CrossEntropy.Config(), EQUAL), **EXACT)


@pytest.mark.parametrize("rule", ["effective_number", "power", "log_ratio"])
@pytest.mark.parametrize("mean", ["weights", "images"])
def test_weights_of_equal_counts_change_nothing(rule, mean):
    found = with_counts(CrossEntropy.Config(), EQUAL, ClassWeights(rule=rule, mean=mean))
    torch.testing.assert_close(found, with_counts(CrossEntropy.Config(), EQUAL), **EXACT)


@pytest.mark.parametrize(
    "name", ["balanced_softmax", "las", "seesaw", "lade", "robal", "distribution_balanced", "ldam"]
)
def test_only_ratios_of_the_counts_matter(name):
    config = registry.piece("objective", name).Config()
    torch.testing.assert_close(with_counts(config, 10 * COUNTS), with_counts(config, COUNTS), **EXACT)


@pytest.mark.parametrize(("rule", "same"), [("power", True), ("log_ratio", True), ("effective_number", False)])
def test_only_ratios_of_the_counts_matter_to_weights_but_of_effective_numbers(rule, same):
    weights = ClassWeights(rule=rule)
    found, expected = (with_counts(CrossEntropy.Config(), times * COUNTS, weights) for times in (10, 1))
    assert torch.isclose(found, expected, atol=1e-12, rtol=1e-12) == same


def test_a_power_of_minus_one_counts_classes_by_their_images():
    """As torch does with weights n / max(n), which DRO-LT's published code has beside its own loss."""
    counts, labels, now = torch.tensor([100, 40, 10, 4]), torch.tensor([0, 2, 3]), Progress(1, 4)
    objective = CrossEntropy(CrossEntropy.Config(), counts, 1)
    objective.weigh(ClassWeights(rule="power", power=-1), counts)
    loss, _ = objective(Z[None].double(), labels, StepContext(objective.denominators(labels, now), now))
    expected = torch.nn.functional.cross_entropy(Z.double(), labels, weight=counts.double() / 100)
    torch.testing.assert_close(loss, expected, **EXACT)
