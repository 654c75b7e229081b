"""Groups, calibration and the bookkeeping of scores."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from aggregation.metrics import Scores, expected_calibration_error, groups_by_count, groups_by_index

COUNTS = [150, 101, 100, 20, 19, 1]


def as_lists(groups):
    return {name: ids.tolist() for name, ids in groups.items()}


def draw(num_images=40, num_classes=6, seed=0):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, num_images, num_classes, generator=draws) * 4
    labels = torch.randint(num_classes, (num_images,), generator=draws)
    return {"ensemble": logits.mean(0), "expert0": logits[0], "expert1": logits[1]}, labels


def scored(member_logits, labels, *slices, per_image=None):
    scores = Scores()
    for images in slices or (slice(None),):
        extras = {name: numbers[images] for name, numbers in (per_image or {}).items()}
        scores.update({member: z[images] for member, z in member_logits.items()}, labels[images], extras)
    return scores


def test_groups_by_count_put_100_and_20_into_medium():
    assert as_lists(groups_by_count(COUNTS)) == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}


def test_groups_by_index_sort_by_count_with_ties_by_class():
    counts = [5, 9, 5, 100, 5]
    assert as_lists(groups_by_index(counts, (2, 3))) == {"many": [1, 3], "medium": [0], "few": [2, 4]}


def test_groups_may_be_empty():
    assert as_lists(groups_by_count([30, 40])) == {"many": [], "medium": [0, 1], "few": []}
    assert as_lists(groups_by_index([30, 40], (0, 2))) == {"many": [], "medium": [0, 1], "few": []}


@pytest.mark.parametrize("cuts", [(3, 2), (-1, 2), (1, 7), (1,), (1, 2, 3)])
def test_cuts_that_do_not_fit_are_refused(cuts):
    with pytest.raises(ValueError, match=r"dataset\.index_groups"):
        groups_by_index(COUNTS, cuts)


def test_calibration_of_perfect_and_hopeless_confidence():
    assert expected_calibration_error(np.ones(4), np.ones(4)) == (0, 0)
    assert expected_calibration_error(np.ones(4), np.zeros(4)) == (1, 1)


def test_a_confidence_of_zero_is_in_the_first_bin():
    """Two images in (0, 0.5]: confidence 0 and 0.5, one right: |0.5 - 0.25|."""
    assert expected_calibration_error(np.array([0.0, 0.5]), np.array([True, False]), bins=2) == (0.25, 0.25)


def test_one_image_is_one_bin():
    assert expected_calibration_error(np.array([0.7]), np.array([False])) == pytest.approx((0.7, 0.7))


@pytest.mark.parametrize(
    ("confidence", "correct"), [([], []), ([0.5], [True, False]), ([1.5], [True]), ([np.nan], [True]), ([-0.1], [True])]
)
def test_calibration_refuses_what_is_no_confidence(confidence, correct):
    with pytest.raises(ValueError, match="confidence"):
        expected_calibration_error(np.array(confidence), np.array(correct, bool))


def test_results_are_right_by_hand():
    """Class 0 (many): 1 of 2 right; class 2 (medium): 1 of 1; class 4 (few): 0 of 1; the others have no image.

    Scores are log-probabilities of 0.9 for the prediction and 0.02 for the five others.
    """
    labels, predictions = torch.tensor([0, 0, 2, 4]), torch.tensor([0, 1, 2, 0])
    p = torch.full((4, 6), 0.02, dtype=torch.float64).scatter(1, predictions[:, None], 0.9)
    result = scored({"ensemble": p.log()}, labels).result(COUNTS, (1, 4))
    assert result["num_images"] == 4
    member = result["members"]["ensemble"]
    assert member["top1"] == {
        "all": 0.5,
        "many": 0.5,
        "medium": 1.0,
        "few": 0.0,
        "many_by_index": 0.5,
        "medium_by_index": 1.0,
        "few_by_index": 0.0,
    }
    assert member["per_class"] == [0.5, None, 1.0, None, 0.0, None]
    assert member["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.02)) / 2)
    assert member["ece"] == pytest.approx(0.4)
    assert member["mce"] == pytest.approx(0.4)
    without = scored({"ensemble": p.log()}, labels).result(COUNTS, (1, 4), probabilities=False)["members"]["ensemble"]
    assert without == member | {"nll": None, "ece": None, "mce": None}


def test_groups_without_classes_or_without_images_are_none():
    member_logits, _ = draw(num_images=4)
    scores = scored(member_logits, torch.tensor([2, 2, 3, 3]))
    top1 = scores.result(COUNTS, (0, 2))["members"]["ensemble"]["top1"]
    assert top1["many"] is None  # has classes, but the split has no image of them
    assert top1["few"] is None
    assert top1["many_by_index"] is None  # has no class
    assert top1["medium"] is not None
    without_cuts = scores.result(COUNTS, None)["members"]["ensemble"]["top1"]
    assert [without_cuts[f"{group}_by_index"] for group in ("many", "medium", "few")] == [None] * 3


def test_results_are_plain_json():
    member_logits, labels = draw()
    result = scored(member_logits, labels).result(COUNTS, (2, 4))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("seed", range(3))
def test_pieces_merged_in_any_order_give_the_same_result_to_the_last_bit(seed):
    member_logits, labels = draw(num_images=200, seed=seed)
    whole = scored(member_logits, labels).result(COUNTS, (2, 4))
    pieces = [slice(120, 200), slice(0, 7), slice(7, 7), slice(7, 120)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        merged = Scores()
        for k in order:
            merged.merge(scored(member_logits, labels, pieces[k]))
        assert merged.result(COUNTS, (2, 4)) == whole
    assert scored(member_logits, labels, *pieces).result(COUNTS, (2, 4)) == whole


def test_state_makes_the_round_trip_as_plain_arrays():
    member_logits, labels = draw()
    scores = scored(member_logits, labels, slice(0, 10), slice(10, 40))
    state = scores.state()
    assert {type(array) for array in state.values()} == {np.ndarray}
    assert not any(array.dtype.hasobject for array in state.values())
    again = Scores.from_state(state)
    assert again.num_images == 40
    assert again.result(COUNTS, (2, 4)) == scores.result(COUNTS, (2, 4))


def test_a_replica_without_images_can_be_sent_and_merged():
    nothing = Scores.from_state(Scores().state())
    assert nothing.num_images == 0
    member_logits, labels = draw()
    scores = scored(member_logits, labels)
    before = scores.result(COUNTS, None)
    scores.merge(nothing)
    nothing.merge(scores)
    assert scores.result(COUNTS, None) == nothing.result(COUNTS, None) == before


def test_merging_leaves_the_other_alone():
    member_logits, labels = draw()
    a, b = scored(member_logits, labels, slice(0, 10)), scored(member_logits, labels, slice(10, 40))
    a.merge(b)
    assert (a.num_images, b.num_images) == (40, 30)


def test_scores_are_small():
    """Per image 8 bytes of label and 17 for each of three members."""
    member_logits, labels = draw(num_images=1000)
    state = scored(member_logits, labels).state()
    assert sum(array.nbytes for array in state.values()) == 1000 * (8 + 3 * 17)


def test_equal_scores_count_as_the_first_class():
    scores = scored({"ensemble": torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])}, torch.tensor([1, 1]))
    assert scores.result([5, 5, 5], None)["members"]["ensemble"]["per_class"] == [None, 0.5, None]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused_by_member(bad):
    member_logits, labels = draw()
    member_logits["expert1"][7, 2] = bad
    scores = scored(member_logits, labels, slice(0, 10), slice(10, 40))
    for read in (scores.state, lambda: Scores().merge(scores), lambda: scores.result(COUNTS, None)):
        with pytest.raises(ValueError, match="expert1: 1 of 40 images have scores that are not finite"):
            read()


def test_inputs_that_do_not_fit_are_refused():
    member_logits, labels = draw()
    scores = scored(member_logits, labels)
    with pytest.raises(ValueError, match="cannot take in scores of expert0"):
        scores.update({"expert0": member_logits["expert0"]}, labels)
    with pytest.raises(ValueError, match="cannot take in scores of expert0"):
        scores.merge(scored({"expert0": member_logits["expert0"]}, labels))
    with pytest.raises(ValueError, match="do not fit 39 labels"):
        Scores().update(member_logits, labels[1:])
    for wrong in (6, -1):
        with pytest.raises(ValueError, match="ensemble has 6 classes"):
            scored(member_logits, torch.cat([labels[1:], torch.tensor([wrong])])).state()
    with pytest.raises(ValueError, match=r"expert0: scores \(40, 5\) do not fit 40 labels and 6 classes"):
        Scores().update(member_logits | {"expert0": member_logits["expert0"][:, 1:]}, labels)
    with pytest.raises(ValueError, match="nobody"):
        Scores().update({}, labels)
    with pytest.raises(ValueError, match="label 5; there are 5 classes"):
        scores.result(COUNTS[:5], None)
    with pytest.raises(ValueError, match="no image was scored"):
        Scores().result(COUNTS, None)


def test_half_precision_scores_are_summarised_in_float64():
    scores = scored({"ensemble": torch.tensor([[12.0, 0.0]], dtype=torch.bfloat16)}, torch.tensor([0]))
    member = scores.result([5, 5], None)["members"]["ensemble"]
    assert member["nll"] == pytest.approx(math.log1p(math.exp(-12)), rel=1e-9)


def test_extra_numbers_are_averaged_as_accuracies_are():
    """Class 0 (many): 1 and 2; class 1 (many): 3; class 2 (medium): 3; class 4 (few): 2. Many: (1.5 + 3) / 2."""
    labels = torch.tensor([0, 1, 0, 2, 4])
    z = {"ensemble": torch.zeros(5, 6)}
    used = {"experts_used": torch.tensor([1, 3, 2, 3, 2])}
    assert scored(z, labels, per_image=used).result(COUNTS, (1, 3))["per_image"] == {
        "experts_used": {
            "all": 2.2,
            "many": 2.25,
            "medium": 3.0,
            "few": 2.0,
            "many_by_index": 1.5,
            "medium_by_index": 3.0,
            "few_by_index": 2.0,
        }
    }
    few = scored(z, labels, slice(0, 4), per_image=used).result(COUNTS, None)["per_image"]["experts_used"]
    assert (few["few"], few["many_by_index"]) == (None, None)
    assert scored(z, labels).result(COUNTS, None)["per_image"] == {}


@pytest.mark.parametrize("seed", range(3))
def test_extra_numbers_merge_in_any_order_and_survive_the_round_trip(seed):
    member_logits, labels = draw(num_images=200, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    extras = {"experts_used": torch.randint(1, 4, (200,), generator=draws), "doubt": torch.rand(200, generator=draws)}
    whole = scored(member_logits, labels, per_image=extras).result(COUNTS, (2, 4))
    pieces = [slice(120, 200), slice(0, 7), slice(7, 7), slice(7, 120)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        merged = Scores()
        for k in order:
            merged.merge(Scores.from_state(scored(member_logits, labels, pieces[k], per_image=extras).state()))
        merged.merge(Scores.from_state(Scores().state()))
        assert merged.result(COUNTS, (2, 4)) == whole
    assert whole["per_image"]["doubt"]["all"] == pytest.approx(extras["doubt"].double().mean().item())


def test_extra_numbers_do_not_hide_members_of_the_same_name():
    labels = torch.tensor([0, 1])
    z = {"doubt": torch.eye(2, 6), "per_image:doubt": torch.eye(2, 6)}
    scores = scored(z, labels, per_image={"doubt": torch.tensor([0.25, 0.75]), "correct": torch.tensor([3, 4])})
    again = Scores.from_state(scores.state()).result(COUNTS, None)
    assert again == scores.result(COUNTS, None)
    assert again["per_image"]["doubt"]["all"] == 0.5
    assert list(again["members"]) == ["doubt", "per_image:doubt"]


def test_extra_numbers_that_do_not_fit_are_refused():
    member_logits, labels = draw()
    numbers = torch.ones(40)
    with pytest.raises(ValueError, match=r"experts_used: numbers .* do not fit 40 labels"):
        scored(member_logits, labels, per_image={"experts_used": torch.ones(40, 1)})
    with pytest.raises(ValueError, match="a name without '/'"):
        scored(member_logits, labels, per_image={"experts/used": numbers})
    broken = {"doubt": numbers.masked_fill(torch.arange(40) == 3, float("nan"))}
    with pytest.raises(ValueError, match="doubt: 1 of 40 numbers are not finite"):
        scored(member_logits, labels, per_image=broken).state()
    explained = Scores({"doubt": "ask again"})
    explained.update(member_logits, labels, broken)
    with pytest.raises(ValueError, match=r"^ask again$"):
        explained.state()
    with_numbers, without = scored(member_logits, labels, per_image={"doubt": numbers}), scored(member_logits, labels)
    with pytest.raises(ValueError, match="doubt per image cannot take in scores with no extra number"):
        with_numbers.merge(without)
    with pytest.raises(ValueError, match="no extra number per image cannot take in scores with doubt"):
        without.merge(with_numbers)
