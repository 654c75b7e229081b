"""How different experts are: by hand, against definitions written out image by image, and the bookkeeping."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from aggregation.diversity import Diversity, divergence_from_mean, main_predictions, metrics
from aggregation.metrics import Scores

COUNTS = [150, 101, 100, 20, 19, 1]
ALL = ("all", "many", "medium", "few", "many_by_index", "medium_by_index", "few_by_index")


def draw(num_images=60, num_experts=3, num_classes=6, seed=0):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_experts, num_images, num_classes, generator=draws, dtype=torch.float64) * 3
    return {f"expert{k}": z for k, z in enumerate(logits)}, torch.randint(num_classes, (num_images,), generator=draws)


def taken(expert_logits, labels, *slices):
    diversity = Diversity()
    for images in slices or (slice(None),):
        diversity.update({name: z[images] for name, z in expert_logits.items()}, labels[images])
    return diversity


def saying(*predictions, num_classes=6):
    """Experts that give 2 to the class they predict and 0 to the others."""
    return {
        f"expert{k}": 2 * torch.nn.functional.one_hot(torch.tensor(one), num_classes).double()
        for k, one in enumerate(predictions)
    }


def test_results_are_right_by_hand():
    """Five images of classes 0 0 1 (many), 2 (medium), 4 (few).

    image   experts say   main   pairs apart   error   main wrong   leave main
      0        0 0 0        0         0          0          0           0
      0        0 0 1        0        2/3        1/3         0          1/3
      1        0 0 1        0        2/3        2/3         1          1/3
      2        3 3 3        3         0          1          1           0
      4        4 4 4        4         0          0          0           0
    Means over all images, and over classes of a group: many is of class 0 (mean of two images) and class 1.
    """
    experts = saying([0, 0, 0, 3, 4], [0, 0, 0, 3, 4], [0, 1, 1, 3, 4])
    result = taken(experts, torch.tensor([0, 0, 1, 2, 4])).result(COUNTS, (1, 3))
    assert (result["num_experts"], result["experts"]) == (3, ["expert0", "expert1", "expert2"])

    def expect(key, *values):
        assert [result[key][group] for group in ALL] == pytest.approx(values), key

    expect("disagreement", 4 / 15, (1 / 3 + 2 / 3) / 2, 0, 0, 1 / 3, (2 / 3 + 0) / 2, 0)
    expect("agreement", 3 / 5, (1 / 2 + 0) / 2, 1, 1, 1 / 2, (0 + 1) / 2, 1)
    expect("error", 2 / 5, (1 / 6 + 2 / 3) / 2, 1, 0, 1 / 6, (2 / 3 + 1) / 2, 0)
    expect("bias", 2 / 5, (0 + 1) / 2, 1, 0, 0, (1 + 1) / 2, 0)
    expect("variance", 2 / 15, (1 / 6 + 1 / 3) / 2, 0, 0, 1 / 6, (1 / 3 + 0) / 2, 0)
    pairs = {tuple(pair["experts"]): pair["disagreement"]["all"] for pair in result["pairs"]}
    assert pairs == {("expert0", "expert1"): 0, ("expert0", "expert2"): 0.4, ("expert1", "expert2"): 0.4}


def test_divergence_is_right_by_hand():
    """Logits (ln 9, 0) and (0, 0): their mean is (ln 3, 0), so q = (3/4, 1/4), p = (9/10, 1/10) and (1/2, 1/2)."""
    logits = torch.tensor([[[math.log(9), 0.0]], [[0.0, 0.0]]], dtype=torch.float64)
    first = 3 / 4 * math.log(0.75 / 0.9) + 1 / 4 * math.log(0.25 / 0.1)
    second = 3 / 4 * math.log(0.75 / 0.5) + 1 / 4 * math.log(0.25 / 0.5)
    assert divergence_from_mean(logits).flatten().tolist() == pytest.approx([first, second])
    result = taken({"a": logits[0], "b": logits[1]}, torch.tensor([0])).result([200, 10], None)
    assert (result["divergence"]["a"]["many"], result["divergence"]["b"]["all"]) == pytest.approx((first, second))
    assert result["mean_divergence"]["all"] == pytest.approx((first + second) / 2)
    assert result["mean_divergence"]["few"] is None


@pytest.mark.parametrize("seed", range(4))
def test_results_are_those_of_the_definitions(seed):
    """Written out image by image with NumPy in float64, for four experts and classes that often tie."""
    experts, labels = draw(num_experts=4, seed=seed)
    z = np.stack([values.numpy() for values in experts.values()])
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    mean = z.mean(0)
    q = np.exp(mean) / np.exp(mean).sum(-1, keepdims=True)
    apart, main_wrong, leave, divergence = [], [], [], []
    for n, label in enumerate(labels.tolist()):
        said = z[:, n].argmax(-1).tolist()
        votes = Counter(said)
        main = max(votes, key=lambda c: (votes[c], mean[n, c]))
        apart.append(np.mean([said[j] != said[k] for j in range(4) for k in range(j)]))
        main_wrong.append(main != label)
        leave.append(np.mean([one != main for one in said]))
        divergence.append([(q[n] * np.log(q[n] / p[k, n])).sum() for k in range(4)])
    result = taken(experts, labels).result(COUNTS, None)
    few = np.isin(labels, [4, 5])

    def by_class(values):
        return np.mean([np.mean(np.array(values)[labels == c], axis=0) for c in (4, 5)], axis=0)

    assert few.any()
    for key, values in (("disagreement", apart), ("bias", main_wrong), ("variance", leave)):
        assert result[key]["all"] == pytest.approx(np.mean(values), rel=1e-12)
        assert result[key]["few"] == pytest.approx(by_class(values), rel=1e-12)
    for k, name in enumerate(experts):
        assert result["divergence"][name]["all"] == pytest.approx(np.mean(divergence, axis=0)[k], rel=1e-9)
        assert result["divergence"][name]["few"] == pytest.approx(by_class(divergence)[k], rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_error_is_bias_and_what_variance_costs_or_gains(seed):
    """Domingos' identity: error = bias + departures where main is right - right departures where main is wrong."""
    experts, labels = draw(num_images=300, seed=seed)
    result = taken(experts, labels).result(COUNTS, None)
    logits = torch.stack(list(experts.values()))
    said = logits.argmax(-1)
    main = main_predictions(said, logits.mean(0))
    right = main == labels
    costs = ((said != main) & right).double().mean()
    gains = ((said == labels) & ~right).double().mean()
    assert costs > 0 and gains > 0
    assert result["error"]["all"] == pytest.approx(result["bias"]["all"] + float(costs - gains), rel=1e-12)


def test_the_error_is_that_of_the_scores():
    experts, labels = draw()
    scores = Scores()
    scores.update(experts, labels)
    members = scores.result(COUNTS, (2, 4))["members"]
    result = taken(experts, labels).result(COUNTS, (2, 4))
    for group in ALL:
        mean = np.mean([members[name]["top1"][group] for name in experts])
        assert result["error"][group] == pytest.approx(1 - mean)


def test_equal_votes_go_to_the_largest_mean_logit():
    """Expert 0 says class 2 by a hair, expert 1 class 1 by far; then three experts of three minds."""
    two = torch.tensor([[[0.0, 1.0, 1.1]], [[0.0, 4.0, 0.0]]], dtype=torch.float64)
    assert main_predictions(two.argmax(-1), two.mean(0)).tolist() == [1]
    assert main_predictions(two.flip(0).argmax(-1), two.mean(0)).tolist() == [1]
    three = torch.tensor([[[3.0, 0, 0]], [[0, 1.0, 0]], [[0, 0, 2.0]]], dtype=torch.float64)
    assert main_predictions(three.argmax(-1), three.mean(0)).tolist() == [0]


def test_a_class_without_votes_is_never_the_main_prediction():
    """Two experts share class 2 as their second choice, which has the largest mean."""
    z = torch.tensor([[[3.0, 0.0, 2.9]], [[0.0, 3.0, 2.9]]], dtype=torch.float64)
    assert z.mean(0).argmax() == 2
    assert main_predictions(z.argmax(-1), z.mean(0)).item() in (0, 1)


def test_copies_of_one_expert_do_not_differ():
    experts, labels = draw(num_experts=1)
    z = experts["expert0"]
    result = taken({"a": z, "b": z.clone(), "c": z.clone()}, labels).result(COUNTS, (2, 4))
    for group in ALL:
        assert result["disagreement"][group] == result["variance"][group] == 0
        assert result["agreement"][group] == 1
        assert result["mean_divergence"][group] == pytest.approx(0, abs=1e-12)
        assert result["error"][group] == pytest.approx(result["bias"][group])


def test_a_single_expert_has_no_pair():
    experts, labels = draw(num_experts=1)
    result = taken(experts, labels).result(COUNTS, (2, 4))
    assert result["pairs"] == []
    assert result["disagreement"] == result["agreement"] == dict.fromkeys(ALL)
    assert result["variance"]["all"] == 0
    assert result["divergence"]["expert0"]["all"] == 0
    assert result["error"] == result["bias"]
    assert not any("disagreement" in name for name in metrics(result))


def test_groups_without_classes_or_without_images_are_none():
    experts, _ = draw(num_images=4)
    result = taken(experts, torch.tensor([2, 2, 3, 3])).result(COUNTS, (0, 2))
    for key in ("disagreement", "agreement", "mean_divergence", "error", "bias", "variance"):
        assert result[key]["few"] is result[key]["many"] is result[key]["many_by_index"] is None
        assert result[key]["medium"] is not None
    assert taken(experts, torch.tensor([2, 2, 3, 3])).result(COUNTS, None)["bias"]["few_by_index"] is None


def test_results_are_plain_json():
    experts, labels = draw()
    result = taken(experts, labels).result(COUNTS, None)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("seed", range(3))
def test_pieces_merged_in_any_order_give_the_same_result_to_the_last_bit(seed):
    experts, labels = draw(num_images=200, seed=seed)
    whole = taken(experts, labels).result(COUNTS, (2, 4))
    pieces = [slice(120, 200), slice(0, 7), slice(7, 7), slice(7, 120)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        merged = Diversity()
        for k in order:
            merged.merge(Diversity.from_state(taken(experts, labels, pieces[k]).state()))
        merged.merge(Diversity.from_state(Diversity().state()))
        assert merged.num_images == 200
        assert merged.result(COUNTS, (2, 4)) == whole
    assert taken(experts, labels, *pieces).result(COUNTS, (2, 4)) == whole


def test_order_and_names_of_experts_change_names_only():
    experts, labels = draw()
    result = taken(experts, labels).result(COUNTS, (2, 4))
    turned = taken(dict(reversed(experts.items())), labels).result(COUNTS, (2, 4))
    for key in ("disagreement", "agreement", "mean_divergence", "error", "bias", "variance"):
        assert turned[key] == pytest.approx(result[key], rel=1e-12)
    for name in experts:
        assert turned["divergence"][name] == pytest.approx(result["divergence"][name], rel=1e-12)


def test_state_is_small_plain_arrays():
    """Per image 8 bytes of label, 4 of main prediction, 12 for each of three experts."""
    experts, labels = draw(num_images=1000)
    state = taken(experts, labels).state()
    assert {type(array) for array in state.values()} == {np.ndarray}
    assert not any(array.dtype.hasobject for array in state.values())
    assert sum(array.nbytes for array in state.values()) == 1000 * (12 + 3 * 12)


def test_merging_leaves_the_other_alone():
    experts, labels = draw()
    a, b = taken(experts, labels, slice(0, 10)), taken(experts, labels, slice(10, 60))
    a.merge(b)
    assert (a.num_images, b.num_images) == (60, 50)


def test_numbers_for_the_journal_are_by_member_and_group():
    experts, labels = draw()
    result = taken(experts, labels).result(COUNTS, None)
    found = metrics(result)
    assert found["ensemble/few/disagreement"] == result["disagreement"]["few"]
    assert found["ensemble/all/expert_error"] == result["error"]["all"]
    assert found["expert2/many/divergence"] == result["divergence"]["expert2"]["many"]
    assert not any("by_index" in name or value is None for name, value in found.items())
    assert len(found) == 4 * (6 + 3)


def test_half_precision_logits_are_compared_in_float64():
    z = torch.tensor([[12.0, 0.0]], dtype=torch.bfloat16)
    result = taken({"a": z, "b": -z}, torch.tensor([0])).result([5, 5], None)
    p = 1 / (1 + math.exp(-12))
    expected = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert result["divergence"]["a"]["all"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused_by_expert(bad):
    experts, labels = draw()
    experts["expert1"][7, 2] = bad
    diversity = taken(experts, labels, slice(0, 20), slice(20, 60))
    for read in (diversity.state, lambda: Diversity().merge(diversity), lambda: diversity.result(COUNTS, None)):
        with pytest.raises(ValueError, match=r"^expert1: logits are not finite"):
            read()


def test_inputs_that_do_not_fit_are_refused():
    experts, labels = draw()
    diversity = taken(experts, labels)
    one = {"expert0": experts["expert0"]}
    with pytest.raises(ValueError, match="cannot take in predictions of expert0"):
        diversity.update(one, labels)
    with pytest.raises(ValueError, match="cannot take in predictions of expert0"):
        diversity.merge(taken(one, labels))
    with pytest.raises(ValueError, match="do not fit 59 labels"):
        Diversity().update(experts, labels[1:])
    with pytest.raises(ValueError, match=r"logits \(60, 5\), \(60, 6\) do not fit"):
        Diversity().update(experts | {"expert1": experts["expert1"][:, 1:]}, labels)
    with pytest.raises(ValueError, match="1 expert or more, got none"):
        Diversity().update({}, labels)
    for wrong in (6, -1):
        with pytest.raises(ValueError, match="the experts have 6 classes"):
            taken(experts, torch.cat([labels[1:], torch.tensor([wrong])])).state()
    with pytest.raises(ValueError, match="label 5; there are 5 classes"):
        diversity.result(COUNTS[:5], None)
    with pytest.raises(ValueError, match="no image was taken in"):
        Diversity().result(COUNTS, None)
