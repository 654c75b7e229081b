"""Every registered aggregator turns the experts' outputs into sound scores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import aggregation
from aggregation.aggregator import Outputs
from experts import registry
from experts.cases import cases_of
from experts.ensemble import Expert
from experts.heads.linear import LinearHead

registry.import_pieces(aggregation)
NAMES = tuple(f"expert{k}" for k in range(4))
TRIALS = [
    (name, number)
    for name in registry.registered_names("aggregator")
    for number in range(len(cases_of("aggregator", name, NAMES)))
]
"""Every rule in each of its cases, by number: a case depends on the experts."""
every_aggregator = pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: f"{trial[0]}-{trial[1]}")

COUNTS = torch.tensor([200, 101, 50, 20, 5, 1])
NUM_CLASSES = len(COUNTS)


def aggregator(trial, num_experts, counts=COUNTS):
    name, number = trial
    config = cases_of("aggregator", name, NAMES[:num_experts])[number].config
    return registry.build("aggregator", config, counts, NAMES[:num_experts])


def outputs(rule, num_experts=3, dtype=torch.float64, images=6):
    """Return logits, row norms of equal heads, and gates of both signs."""
    draws = torch.Generator().manual_seed(num_experts)

    def normal(*shape):
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    head = LinearHead(LinearHead.Config(), 4, NUM_CLASSES)
    nn.init.constant_(head.weight, 0.5)
    numbers_EK = rule.describe(Expert(nn.Identity(), head)).expand(num_experts, -1)
    logits_EBC, gates_EB = 5 * normal(num_experts, images, NUM_CLASSES), normal(num_experts, images)
    return Outputs(logits_EBC.to(dtype), numbers_EK, gates_EB.to(dtype))


def with_logits(given, logits_EBC):
    return Outputs(logits_EBC, given.numbers_EK, given.gates_EB)


def test_the_aggregators_of_the_recipes_are_registered():
    needed = {"mean_logits", "sum_logits", "mean_probabilities", "weighted", "only", "ace", "router"}
    needed |= {"logit_adjusted", "uno_ic"}
    assert needed <= set(registry.registered_names("aggregator"))


@every_aggregator
def test_an_expert_is_described_where_it_lies(trial):
    """NCCL refuses tensors of the CPU, and every worker's numbers go through it."""
    expert = Expert(nn.Identity(), LinearHead(LinearHead.Config(), 4, NUM_CLASSES)).to("meta")
    assert aggregator(trial, 3).describe(expert).device.type == "meta"


@every_aggregator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_are_one_row_per_image_in_at_least_float32(trial, dtype):
    rule = aggregator(trial, 3)
    scores_BC = rule(outputs(rule, dtype=dtype))
    assert scores_BC.shape == (6, NUM_CLASSES)
    assert scores_BC.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(scores_BC).all()


@every_aggregator
def test_members_begin_with_the_ensemble_and_have_its_shape(trial):
    rule = aggregator(trial, 3)
    given = outputs(rule)
    members = rule.members(given)
    assert next(iter(members)) == "ensemble"
    assert torch.equal(members["ensemble"], rule(given))
    assert {tuple(scores_BC.shape) for scores_BC in members.values()} == {(6, NUM_CLASSES)}
    assert not {"expert0", "expert1", "expert2"} & set(members)


@every_aggregator
def test_experts_used_are_one_to_all(trial):
    rule = aggregator(trial, 3)
    used_B = rule.experts_used(outputs(rule))
    assert used_B is None or (used_B.shape == (6,) and 1 <= used_B.min() <= used_B.max() <= 3)


def assert_same_probabilities(rule, scores_BC, logits_BC):
    """Unless the rule corrects classes; then a class gains the same in every image, and some other than others."""
    gained_BC = scores_BC.log_softmax(dim=1) - logits_BC.log_softmax(dim=1)
    gained_BC = gained_BC - gained_BC.mean(dim=1, keepdim=True)
    torch.testing.assert_close(gained_BC, gained_BC[:1].expand_as(gained_BC), atol=1e-10, rtol=0)
    assert (gained_BC.abs().max() > 0.1) == bool(rule.corrects_classes)


@every_aggregator
def test_one_expert_keeps_its_probabilities(trial):
    rule = aggregator(trial, 1)
    single = outputs(rule, 1)
    assert_same_probabilities(rule, rule(single), single.logits_EBC[0])


@every_aggregator
def test_experts_that_agree_keep_their_probabilities_or_add_up(trial):
    rule = aggregator(trial, 4)
    given = outputs(rule, 4)
    copies = with_logits(given, given.logits_EBC[:1].expand(4, -1, -1))
    assert_same_probabilities(rule, rule(copies), copies.logits_EBC[0] * (4 if rule.agreement_adds else 1))


@every_aggregator
def test_the_order_of_experts_matters_only_where_the_rule_says_so(trial):
    rule = aggregator(trial, 3)
    given = outputs(rule)
    turned = rule(Outputs(given.logits_EBC.flip(0), given.numbers_EK.flip(0), given.gates_EB))
    same = torch.allclose(turned, rule(given), atol=1e-12, rtol=1e-12)
    assert same == (not rule.order_matters)


@every_aggregator
def test_renamed_classes_keep_their_scores(trial):
    rule = aggregator(trial, 3)
    given = outputs(rule)
    order = torch.tensor([2, 0, 3, 1, 5, 4])
    renamed = aggregator(trial, 3, COUNTS[order])
    numbers_EK = given.numbers_EK[:, order] if given.numbers_EK.shape[1] else given.numbers_EK
    scores = renamed(Outputs(given.logits_EBC[:, :, order], numbers_EK, given.gates_EB))
    torch.testing.assert_close(scores, rule(given)[:, order], atol=1e-12, rtol=1e-12)


@every_aggregator
def test_images_do_not_influence_each_other_and_an_empty_batch_gives_no_scores(trial):
    rule = aggregator(trial, 3)
    given = outputs(rule)
    for images in (slice(0, 0), slice(2, 3), slice(1, 6)):
        part = Outputs(given.logits_EBC[:, images], given.numbers_EK, given.gates_EB[:, images])
        torch.testing.assert_close(rule(part), rule(given)[images], atol=1e-12, rtol=1e-12)


@every_aggregator
def test_inputs_are_unchanged(trial):
    rule = aggregator(trial, 3)
    given, before = outputs(rule), outputs(rule)
    rule.members(given)
    rule.experts_used(given)
    assert torch.equal(given.logits_EBC, before.logits_EBC)
    assert torch.equal(given.numbers_EK, before.numbers_EK)
    assert torch.equal(given.gates_EB, before.gates_EB)


@every_aggregator
def test_extreme_scores_stay_finite(trial):
    rule = aggregator(trial, 2)
    given = outputs(rule, 2, images=1)
    z = torch.zeros(2, 1, NUM_CLASSES)
    z[:, 0, 0], z[1, 0, 1] = 1e4, -1e4
    assert torch.isfinite(rule(with_logits(given, z))).all()
