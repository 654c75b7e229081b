"""Scores and diversity measured together are those measured apart, to the last bit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from aggregation.aggregator import MeanLogits, Outputs
from aggregation.diversity import Diversity
from aggregation.metrics import Scores, SplitMeans, all_groups
from aggregation.tally import Tally

COUNTS = [150, 101, 100, 20, 19, 1]
NAMES = ("a", "b", "c")


def draw(dtype=torch.float32, num_images=90, seed=0):
    draws = torch.Generator().manual_seed(seed)
    logits_EBC = (3 * torch.randn(3, num_images, len(COUNTS), generator=draws)).to(dtype)
    return logits_EBC, torch.randint(len(COUNTS), (num_images,), generator=draws)


def tallied(logits_ENC, labels_N, *pieces):
    tally = Tally(MeanLogits(MeanLogits.Config(), torch.tensor(COUNTS), NAMES), NAMES)
    for piece in pieces or (slice(None),):
        tally.add(Outputs(logits_ENC[:, piece]), labels_N[piece])
    return tally


def as_bytes(states):
    return [{name: (array.dtype, array.tobytes()) for name, array in state.items()} for state in states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_states_are_those_of_scores_and_diversity_alone(dtype):
    logits_ENC, labels_N = draw(dtype)
    experts = dict(zip(NAMES, logits_ENC, strict=True))
    mean_NC = logits_ENC.to(torch.promote_types(dtype, torch.float32)).mean(0)
    scores, diversity = Scores(), Diversity()
    scores.update({"ensemble": mean_NC, **experts}, labels_N)
    diversity.update(experts, labels_N)
    assert as_bytes(tallied(logits_ENC, labels_N).states()) == as_bytes([scores.state(), diversity.state()])


def test_states_do_not_depend_on_the_cut_into_batches():
    logits_ENC, labels_N = draw()
    whole = as_bytes(tallied(logits_ENC, labels_N).states())
    for cuts in ([0, 90], [0, 1, 7, 7, 64, 90], [*range(0, 91, 9)]):
        pieces = [slice(a, b) for a, b in pairwise(cuts)]
        assert as_bytes(tallied(logits_ENC, labels_N, *pieces).states()) == whole


def test_states_are_measured_as_defined():
    """Written out image by image; the arrays of members and experts by name."""
    logits_ENC, labels_N = draw(torch.float64)
    scores, diversity = tallied(logits_ENC, labels_N).states()
    log_p_ENC = logits_ENC.log_softmax(-1)
    own_EN = log_p_ENC[:, torch.arange(90), labels_N]
    for name, z_NC, log_p_NC, own_N in zip(NAMES, logits_ENC, log_p_ENC, own_EN, strict=True):
        assert (scores[f"{name}/correct"] == (z_NC.argmax(1) == labels_N).numpy()).all()
        assert (scores[f"{name}/confidence"] == log_p_NC.max(1).values.exp().numpy()).all()
        assert (scores[f"{name}/nll"] == -own_N.numpy()).all()
        assert (diversity[f"{name}/prediction"] == z_NC.argmax(1).numpy()).all()
    assert (scores["labels"] == labels_N.numpy()).all() and (diversity["labels"] == labels_N.numpy()).all()


def test_results_are_those_of_merged_states():
    logits_ENC, labels_N = draw()
    together = tallied(logits_ENC, labels_N).result(COUNTS, (2, 4), True)
    scores, diversity = Scores(), Diversity()
    for piece in (slice(50, 90), slice(0, 50)):
        states = tallied(logits_ENC, labels_N, piece).states()
        scores.merge(Scores.from_state(states[0]))
        diversity.merge(Diversity.from_state(states[1]))
    assert together == scores.result(COUNTS, (2, 4)) | {"diversity": diversity.result(COUNTS, (2, 4))}


def test_an_empty_share_has_an_empty_state():
    scores, diversity = tallied(*draw(num_images=0)).states()
    assert {len(array) for array in (*scores.values(), *diversity.values())} == {0}
    nothing = Tally(MeanLogits(MeanLogits.Config(), torch.tensor(COUNTS), NAMES), NAMES).states()
    assert [list(state) for state in nothing] == [["labels"], ["labels"]]


@pytest.mark.parametrize("kind", ["bool", "few values", "floats"])
@pytest.mark.parametrize("seed", range(3))
def test_means_are_sums_in_ascending_order_whatever_the_order_of_the_images(kind, seed):
    draws = np.random.default_rng(seed)
    labels_N = draws.integers(0, 5, 400)  # the last class has no image
    values_N = {
        "bool": draws.random(400) < 0.3,
        "few values": draws.integers(0, 4, 400) / 3,
        "floats": draws.random(400),
    }
    values_N = values_N[kind]
    groups = all_groups(COUNTS, (2, 4))
    by_group, mean_C = SplitMeans(labels_N, groups, len(COUNTS)).of_groups_and_classes(values_N)
    for c in range(5):
        total = 0.0
        for value in np.sort(values_N[labels_N == c]).tolist():
            total += value
        assert mean_C[c] == total / (labels_N == c).sum()
    assert np.isnan(mean_C[5])
    assert by_group["all"] == np.sort(values_N).mean()
    assert by_group["few"] == mean_C[4]
    order = draws.permutation(400)
    again = SplitMeans(labels_N[order], groups, len(COUNTS)).of_groups(values_N[order])
    assert again == by_group
