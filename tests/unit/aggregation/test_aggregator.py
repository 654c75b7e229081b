"""Every rule by hand; contract/test_aggregators.py has what every rule must do."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from aggregation.ace import Ace
from aggregation.aggregator import MeanLogits, MeanProbabilities, Only, Outputs, SumLogits, Weighted
from aggregation.router import ALL_EXPERTS, Router
from aggregation.tally import Tally
from experts.class_groups import GroupRule
from experts.ensemble import Expert
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead

# Two classes; expert 0 is nearly certain of class 0, two experts lean to class 1.
LOGITS = torch.tensor([[[6.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]], dtype=torch.float64)
COUNTS = torch.tensor([500, 5])
NAMES = ("stem", "mid", "tail")


def rule(cls, names=NAMES, counts=COUNTS, **settings):
    return cls(cls.Config(**settings), counts, names)


def close(scores, expected, **tolerance):
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=scores.dtype), **tolerance)


def test_mean_logits_are_right_by_hand():
    """(6 + 0 + 0) / 3 = 2 and (0 + 1 + 1) / 3: class 0."""
    close(rule(MeanLogits)(Outputs(LOGITS)), [[2.0, 2 / 3]])


def test_summed_logits_are_right_by_hand():
    close(rule(SumLogits)(Outputs(LOGITS)), [[6.0, 2.0]])


def test_mean_probabilities_are_right_by_hand():
    """(0.997527 + 0.268941 + 0.268941) / 3 = 0.511803."""
    log_p = rule(MeanProbabilities)(Outputs(LOGITS))
    close(log_p.exp(), [[0.511803, 0.488197]], atol=1e-6, rtol=0)
    close(log_p.softmax(dim=1), [[0.511803, 0.488197]], atol=1e-6, rtol=0)


def test_many_timid_votes_beat_one_loud_one_in_probability_only():
    loud = Outputs(torch.cat([LOGITS, LOGITS[1:]]))
    names = ("a", "b", "c", "d", "e")
    assert rule(MeanLogits, names)(loud).argmax() == 0
    assert rule(MeanProbabilities, names)(loud).argmax() == 1


# Weighted


def test_weights_go_by_name():
    """0.1 * 6 = 0.6 of class 0; 0.2 + 0.7 of class 1. The mapping's own order does not matter."""
    weighted = rule(Weighted, weights={"tail": 0.7, "stem": 0.1, "mid": 0.2})
    close(weighted(Outputs(LOGITS)), [[0.6, 0.9]])
    close(weighted(Outputs(torch.stack([0 * LOGITS[0], LOGITS[0], 2 * LOGITS[0]]))), [[9.6, 0.0]])


def test_equal_weights_are_the_mean_and_one_weight_is_one_expert():
    third = rule(Weighted, weights=dict.fromkeys(NAMES, 1 / 3))
    torch.testing.assert_close(third(Outputs(LOGITS)), rule(MeanLogits)(Outputs(LOGITS)))
    torch.testing.assert_close(rule(Weighted, weights={"stem": 0, "mid": 1, "tail": 0})(Outputs(LOGITS)), LOGITS[1])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"stem": 0.5, "mid": 0.5, "tail": 0.5}, "sum to 1.5, needed 1"),
        ({"stem": 0.5, "mid": 0.5, "tail": 2e-6}, "sum to 1.000002, needed 1"),
        ({"stem": 0.5, "mid": -0.5, "tail": 1.0}, "mid must be a number of 0 or more"),
        ({"stem": float("nan"), "mid": 0.5, "tail": 0.5}, "stem must be a number"),
        ({"stem": 0, "mid": 0, "tail": 0}, "sum to 0, needed 1"),
        ({}, "sum to 0, needed 1"),
    ],
)
def test_weights_off_the_simplex_are_refused(weights, message):
    with pytest.raises(ValidationError, match=message):
        Weighted.Config(weights=weights)


def test_a_rounding_in_the_weights_is_accepted():
    Weighted.Config(weights={"stem": 0.333333, "mid": 0.333333, "tail": 0.333334})


@pytest.mark.parametrize("weights", [{"stem": 1.0}, {"stem": 0.5, "mid": 0.25, "tail": 0.25, "extra": 0.0}])
def test_weights_are_of_exactly_the_experts(weights):
    with pytest.raises(
        ValueError, match=r"method\.aggregator\.weights.*one for each of stem, mid, tail and no other expert"
    ):
        rule(Weighted, weights=weights)


# Only


def test_only_is_the_expert_of_that_name():
    torch.testing.assert_close(
        rule(Only, expert="tail")(Outputs(LOGITS * torch.tensor([1, 1, 3])[:, None, None])), LOGITS[2] * 3
    )


def test_only_refuses_a_stranger():
    with pytest.raises(
        ValueError, match=r"method\.aggregator\.expert = student: no such expert; needed one of stem, mid"
    ):
        rule(Only, expert="student")


# ACE


def ace(counts, names=NAMES, **settings):
    return rule(Ace, names, torch.tensor(counts), **settings)


def test_equal_norms_leave_a_mean_over_the_responsible():
    """Class 0 is stem's alone, class 1 stem's and mid's, class 2 everybody's; classes do not come sorted."""
    z = torch.tensor([[[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]], [[100.0, 200.0, 300.0]]])
    scores = ace([500, 50, 5])(Outputs(z, torch.full((3, 3), 0.7)))
    close(scores, [[1.0, 11.0, 111.0]])
    scores = ace([5, 500, 50])(Outputs(z, torch.full((3, 3), 0.7)))
    close(scores, [[37.0, 2.0, 16.5]])


def test_an_expert_of_large_weights_is_brought_down():
    """mid's row is twice stem's mean of 2: its logit counts half. (2 + 8 / 2) / 2 = 3."""
    z = torch.tensor([[[1.0, 2.0]], [[5.0, 8.0]]])
    norms = torch.tensor([[1.0, 3.0], [77.0, 4.0]])  # 77 is of a class that mid does not answer for
    close(ace([500, 5], ("stem", "mid"), groups=GroupRule(rule="equal"))(Outputs(z, norms)), [[1.0, 3.0]])


def test_row_norms_of_the_heads():
    linear = LinearHead(LinearHead.Config(), 2, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]))
    cosine = CosineHead(CosineHead.Config(scale=16), 2, 3)
    identity = torch.nn.Identity()
    close(ace([500, 50, 5]).describe(Expert(identity, linear)), [5.0, 2.0, 1.0])
    close(ace([500, 50, 5]).describe(Expert(identity, cosine)), [16.0] * 3)
    with pytest.raises(ValueError, match=r"head is a Identity.*method\.head\.name to linear or cosine"):
        ace([500, 50, 5]).describe(Expert(identity, identity))


def test_ace_takes_heads_with_rows():
    config = Ace.Config()
    config.check_head(LinearHead.Config())
    config.check_head(CosineHead.Config())
    with pytest.raises(ValueError, match=r"method\.head\.name = bilateral"):
        config.check_head(type("Head", (), {"name": "bilateral"}))


def test_ace_refuses_what_it_cannot_scale():
    z = torch.zeros(3, 2, 3)
    with pytest.raises(ValueError, match="no row norms"):
        ace([500, 50, 5])(Outputs(z))
    for bad in (0.0, float("nan"), float("inf")):
        norms = torch.ones(3, 3)
        norms[1, 1:] = bad
        with pytest.raises(ValueError, match="the head of mid has rows of norm 0 or not finite"):
            ace([500, 50, 5]).check(norms)
    ace([500, 50, 5]).check(torch.ones(3, 3))


def test_groups_without_a_class_are_refused():
    with pytest.raises(ValueError, match=r"groups\.rule = 'count': no class is medium .*set groups\.rule = 'equal'"):
        ace([500, 400, 300])


# Router

GATES = torch.tensor([[-0.1, 0.2, 0.3, 0.0], [5.0, -1.0, 0.1, 9.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
ROUTED = torch.arange(24, dtype=torch.float64).view(3, 4, 2) ** 2


def test_an_image_stops_at_the_first_gate_that_does_not_ask():
    """First image: the first gate says no, whatever the second says. Last image: a score of exactly 0 is a no.

    The gates' last row means nothing.
    """
    router = rule(Router)
    given = Outputs(ROUTED, gates_EB=GATES)
    assert router.experts_used(given).tolist() == [1, 2, 3, 1]
    scores = router(given)
    torch.testing.assert_close(scores[0], ROUTED[0, 0])
    torch.testing.assert_close(scores[1], (ROUTED[0, 1] + ROUTED[1, 1]) / 2)
    torch.testing.assert_close(scores[2], ROUTED[:, 2].mean(dim=0))
    torch.testing.assert_close(scores[3], ROUTED[0, 3])


def test_a_router_is_measured_beside_always_all():
    router, given = rule(Router), Outputs(ROUTED, gates_EB=GATES)
    members = router.members(given)
    assert list(members) == ["ensemble", ALL_EXPERTS]
    torch.testing.assert_close(members["ensemble"], router(given))
    torch.testing.assert_close(members[ALL_EXPERTS], ROUTED.mean(dim=0))


def test_a_router_needs_sound_gates():
    with pytest.raises(ValueError, match=r"no gates; set method\.router"):
        rule(Router)(Outputs(ROUTED))
    broken = GATES.clone()
    broken[1, 2] = float("nan")
    given = Outputs(ROUTED, gates_EB=broken)
    assert rule(Router)(given).isnan().any(dim=1).tolist() == [False, False, True, False]
    tally = Tally(rule(Router), NAMES)
    tally.add(given, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="scores of the gates are not finite"):
        tally.states()


def test_scores_of_experts_that_were_not_asked_do_not_matter():
    spoilt = ROUTED.clone()
    spoilt[1:, 0] = float("inf")
    torch.testing.assert_close(rule(Router)(Outputs(spoilt, gates_EB=GATES))[0], ROUTED[0, 0])


def test_other_rules_ask_every_expert():
    given = Outputs(LOGITS)
    assert rule(MeanLogits).experts_used(given) is None
    assert list(rule(MeanLogits).members(given)) == ["ensemble"]
    assert rule(MeanLogits).describe(torch.nn.Identity()).shape == (0,)
