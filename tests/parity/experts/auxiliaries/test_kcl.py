"""KCL against numbers from the published code, run on a CPU without its shuffling of the batch, and its draws.

The published queue marks an empty entry by -1 and counts it all the same; here it has a class of its own for that.
"""

from __future__ import annotations

import math

import pytest
import torch

from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.kcl import KCL, drawn_positives, k_positive_contrast
from experts.auxiliaries.queue import EMPTY
from experts.progress import Progress

q = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
keys = torch.tensor([[0.8, 0.6], [0, 1]], dtype=torch.float64)
queue = torch.tensor([[1, 0], [0, 1], [0.6, -0.8], [0.8, 0.6], [-1, 0], [0, -1]], dtype=torch.float64)
labels = torch.tensor([0, 1, 0, 0, 2, 3])
y = torch.tensor([0, 1])
NO_ENTRY = torch.zeros(6, dtype=torch.bool)


def chosen(first, second=(1,)):
    """Return the positives of the two queries, by their places in the queue."""
    found = torch.zeros(2, 6, dtype=torch.bool)
    found[0, list(first)], found[1, list(second)] = True, True
    return found


@pytest.mark.parametrize(
    ("first", "rest", "expected"),
    [
        ((2, 3), "negatives", (1.657924, 1.450289)),
        ((2, 3), "zero", (1.328265, 1.450289)),
        ((0, 2, 3), "negatives", (1.524590, 1.450289)),
        ((2,), "negatives", (1.724590, 1.450289)),
    ],
)
def test_the_loss_of_each_query_is_the_published_one(first, rest, expected):
    same = y[:, None] == labels
    for row, value in enumerate(expected):
        one = slice(row, row + 1)
        found = k_positive_contrast(
            q[one], keys[one], queue, same[one], chosen(first)[one], NO_ENTRY, temperature=0.5, rest=rest
        )
        torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-6)


def piece(**settings):
    found = KCL(KCL.Config(queue_size=6, dim=2, temperature=0.5, **settings), 2, torch.tensor([40, 20, 10, 1])).double()
    found.queue.keys_Kd.copy_(queue)
    found.queue.labels_K.copy_(labels)
    return found


def seen(*draws):
    return Seen(q[None], keys, None, y, draws_BU=torch.tensor(draws, dtype=torch.float64)[:, None])


def test_the_piece_takes_the_first_of_its_class_from_the_place_drawn():
    """From place 2 of 6 on these are 2 and 3, as the published code has chosen; the second query has one in all."""
    found = piece(positives=2).loss(seen(2 / 6 + 0.01, 0.99), Progress(1, 2))
    torch.testing.assert_close(found, torch.tensor(1.554106, dtype=torch.float64), rtol=0, atol=1e-6)


def test_what_is_empty_counts_nothing():
    whole = piece(positives=6)
    whole.queue.labels_K[4:] = EMPTY
    score = (q[0] @ torch.cat([keys[:1], queue[:4]]).T / 0.5).tolist()
    first = math.log(sum(map(math.exp, score))) - (score[0] + score[1] + score[3] + score[4]) / 4
    score = (q[1] @ torch.cat([keys[1:], queue[:4]]).T / 0.5).tolist()
    second = math.log(sum(map(math.exp, score))) - (score[0] + score[2]) / 2
    assert whole.loss(seen(0.5, 0.5), Progress(1, 2)).item() == pytest.approx((first + second) / 2, abs=1e-12)


def test_every_key_of_a_class_is_drawn_equally_often_where_they_are_spread_evenly():
    same = (torch.arange(12) % 3 == 1).repeat(1200, 1)
    draws = (torch.arange(1200) + 0.5) / 1200
    found = drawn_positives(same, draws, 2)
    assert (found.sum(dim=1) == 2).all()
    assert found.sum(dim=0)[same[0]].tolist() == [600] * 4
    assert not found[:, ~same[0]].any()
    assert torch.equal(drawn_positives(same, draws, 9), same)  # fewer than asked for: all of them
    assert drawn_positives(same[:1], torch.ones(1, dtype=torch.float64), 1).sum() == 1


def test_a_class_with_too_few_images_is_named_if_it_is_to_be_refused():
    with pytest.raises(ValueError, match="positives = 11, and 2 of 4 classes have fewer") as refusal:
        piece(positives=11, fewer="refuse")
    assert "class 2 has 10, class 3 has 1; needed as many of each; set positives=1 at most, or fewer=take" in str(
        refusal.value
    )
    assert piece(positives=11).config.fewer == "take"
