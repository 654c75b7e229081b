"""Properties of the multi-expert systems that hold for any numbers: cases are drawn from seeds, not picked by hand.

Shapes: E experts, B images, C classes. Tolerance 1e-12: float64, sums in another order.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from experts.class_groups import GroupRule, nested_targets, split_classes
from experts.losses.cross_entropy import cross_entropy
from experts.methods.ace import ACE
from experts.methods.bbn import BBN
from experts.methods.reslt import ResLT
from experts.methods.tade import TADE, inverse_counts, tade_offsets
from experts.objective import StepContext
from experts.progress import Progress

every_seed = pytest.mark.parametrize("seed", range(5))
THIRDS = {"rule": "equal"}
OBJECTIVES = {
    "tade": (TADE, {}, 3),
    "reslt": (ResLT, {"beta": 0.7, "groups": THIRDS}, 3),
    "reslt-guarded": (ResLT, {"beta": 0.7, "groups": THIRDS, "fused": "guarded", "log_guard": 1e-2}, 3),
    "reslt-two": (ResLT, {"beta": 0.7, "groups": THIRDS}, 2),
    "bbn": (BBN, {}, 2),
    "ace": (ACE, {"groups": THIRDS}, 3),
    "ace-four": (ACE, {"groups": THIRDS}, 4),
    "ace-target": (ACE, {"groups": THIRDS, "softmax_over": "target", "com_reduction": "mean"}, 3),
    "ace-all": (ACE, {"groups": THIRDS, "com_batch": "all"}, 3),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
MIDDLE = Progress(epoch=6, epochs=10)


def draw(name, seed, num_images=9, num_classes=8):
    cls, _, num_experts = OBJECTIVES[name]
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_experts, num_images, num_classes, generator=draws, dtype=torch.float64) * 4
    shape = (2, num_images) if cls.label_sets == 2 else (num_images,)
    labels = torch.randint(num_classes, shape, generator=draws)
    # No two alike: which of two equal classes is the rarer depends on their ids.
    counts = torch.randperm(400, generator=draws)[:num_classes] + 1
    return logits, labels, counts, draws


def build(name, counts_C, **more):
    cls, settings, num_experts = OBJECTIVES[name]
    return cls(cls.Config(**settings | more), counts_C, num_experts)


def loss_of(name, logits_EBC, labels_B, counts_C, now=MIDDLE, **more):
    objective = build(name, counts_C, **more)
    return objective(logits_EBC, labels_B, StepContext(objective.denominators(labels_B, now), now))


def plain(logits_BC, labels_B):
    return cross_entropy(logits_BC[None], labels_B, denominator=torch.tensor(len(labels_B))).squeeze(0)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-12)


@every_objective
@every_seed
def test_renaming_classes_changes_nothing(name, seed):
    logits, labels, counts, draws = draw(name, seed)
    order = torch.randperm(len(counts), generator=draws)
    renamed = order.argsort()[labels]
    close(loss_of(name, logits[:, :, order], renamed, counts[order])[0], loss_of(name, logits, labels, counts)[0])


@every_objective
@every_seed
def test_reordering_and_repeating_images_changes_nothing(name, seed):
    logits, labels, counts, draws = draw(name, seed)
    order = torch.randperm(labels.shape[-1], generator=draws).repeat(2)
    close(loss_of(name, logits[:, order], labels[..., order], counts)[0], loss_of(name, logits, labels, counts)[0])


@pytest.mark.parametrize("name", ["tade", "reslt", "reslt-guarded", "bbn"])
@every_seed
def test_adding_a_constant_to_an_images_scores_changes_nothing(name, seed):
    """Not for ACE, which wants some scores to be zero."""
    logits, labels, counts, draws = draw(name, seed)
    shift = torch.randn(*logits.shape[:2], 1, generator=draws, dtype=torch.float64) * 10
    close(loss_of(name, logits + shift, labels, counts)[0], loss_of(name, logits, labels, counts)[0])


@every_seed
def test_equal_counts_make_tade_three_plain_cross_entropies(seed):
    logits, labels, counts, _ = draw("tade", seed)
    loss, terms = loss_of("tade", logits, labels, torch.full_like(counts, 7))
    close(torch.stack(list(terms.values())), torch.stack([plain(z_BC, labels) for z_BC in logits]))
    close(loss, sum(plain(z_BC, labels) for z_BC in logits))


@every_seed
def test_scaling_all_counts_keeps_tades_offsets_and_reversing_twice_gives_the_counts(seed):
    _, _, counts, _ = draw("tade", seed)
    close(tade_offsets(10 * counts), tade_offsets(counts))
    for ties in ("flip", "stable"):
        inverse = inverse_counts(counts, ties=ties)
        assert torch.equal(inverse_counts(inverse, ties=ties), counts)
        assert torch.equal(inverse.sort().values, counts.sort().values)
        assert torch.equal(inverse.argsort(), counts.argsort().flip(0))


@every_seed
def test_tades_inverse_expert_must_beat_a_steeper_prior_than_the_balanced_one(seed):
    """Its offset falls faster with rarity: to be right on a rare class it must score that class higher still."""
    _, _, counts, _ = draw("tade", seed)
    order = counts.argsort()
    offset_EC = tade_offsets(counts)[:, order]
    assert (offset_EC[2].diff() > offset_EC[1].diff()).all()
    assert (offset_EC[1].diff() > 0).all()


@every_seed
def test_reslt_lies_between_its_branches_and_the_loss_of_the_sum(seed):
    logits, labels, counts, _ = draw("reslt", seed)
    close(loss_of("reslt", logits, labels, counts, beta=0.0)[0], plain(logits.sum(dim=0), labels))
    own, terms = loss_of("reslt", logits, labels, counts, beta=1.0)
    close(own, terms["independent"].sum())
    close(loss_of("reslt", logits, labels, counts, beta=0.3)[0], 0.3 * own + 0.7 * terms["fused"])


@every_seed
def test_without_a_guard_exact_and_guarded_are_one(seed):
    logits, labels, counts, _ = draw("reslt", seed)
    exact, guarded = (
        loss_of("reslt", logits, labels, counts, log_guard=0.0, fused=fused)[0] for fused in ("exact", "guarded")
    )
    close(exact, guarded)


@every_seed
def test_bbn_begins_and_ends_as_cross_entropy_of_one_batch_and_changing_places_mirrors_it(seed):
    logits, labels, counts, _ = draw("bbn", seed)
    total = logits.sum(dim=0)
    close(loss_of("bbn", logits, labels, counts, Progress(1, 10))[0], plain(total, labels[0]))
    at_the_end = loss_of("bbn", logits, labels, counts, Progress(10, 10), alpha_epochs=9)[0]
    close(at_the_end, plain(total, labels[1]))
    _, terms = loss_of("bbn", logits, labels, counts)
    _, mirrored = loss_of("bbn", logits.flip(0), labels.flip(0), counts)
    close(mirrored["conventional"], terms["rebalancing"])
    close(mirrored["rebalancing"], terms["conventional"])


@pytest.mark.parametrize("name", ["ace", "ace-four", "ace-target"])
@every_seed
def test_scores_of_images_that_are_not_an_experts_do_not_matter_to_ace(name, seed):
    logits, labels, counts, _ = draw(name, seed)
    others_EB = ~build(name, counts).rows_EB(labels)
    assert others_EB.any()
    changed = logits + 100.0 * others_EB[..., None]
    close(loss_of(name, changed, labels, counts)[0], loss_of(name, logits, labels, counts)[0])


@every_seed
def test_aces_first_expert_minimises_plain_cross_entropy_and_learning_rates_fall(seed):
    logits, labels, counts, _ = draw("ace-four", seed)
    _, terms = loss_of("ace-four", logits, labels, counts)
    close(terms["classification"][0], plain(logits[0], labels))
    assert terms["complement"][0] == 0
    factors = build("ace-four", counts).lr_factors
    assert factors[0] == 1
    assert list(factors) == sorted(factors, reverse=True)


@every_seed
@pytest.mark.parametrize(
    ("rule", "num_groups"), [(rule, n) for rule in ("equal", "index", "count") for n in (2, 3, 4)][:-1]
)
def test_groups_are_a_partition_from_head_to_tail(rule, num_groups, seed):
    """By count there are at most three groups."""
    draws = torch.Generator().manual_seed(seed)
    counts = torch.cat([torch.tensor([300, 50, 3]), torch.randint(1, 300, (9,), generator=draws)])
    cuts = tuple(range(1, num_groups)) if rule == "index" else None
    config = GroupRule(rule=rule, cuts=cuts)
    groups = [torch.from_numpy(group) for group in split_classes(counts, num_groups, config)]
    assert sorted(torch.cat(groups).tolist()) == list(range(len(counts)))
    for head, tail in pairwise(groups):
        assert counts[head].min() >= counts[tail].max()
    targets = nested_targets(counts, num_groups, config)
    assert targets[0].all()
    assert (targets[1:] <= targets[:-1]).all()
    for place, group in enumerate(groups):
        assert targets[:, group].sum(dim=0).tolist() == [place + 1] * len(group)
