"""Counts and selection of long-tailed sets against the published ones, compared exactly."""

import numpy as np
import pytest

from experts.data.imbalance import hold_out, long_tailed_counts, select

CIFAR100_RATIO_100 = [
    500, 477, 455, 434, 415, 396, 378, 361, 344, 328, 314, 299, 286, 273, 260, 248, 237, 226, 216, 206,
    197, 188, 179, 171, 163, 156, 149, 142, 135, 129, 123, 118, 112, 107, 102, 98, 93, 89, 85, 81,
    77, 74, 70, 67, 64, 61, 58, 56, 53, 51, 48, 46, 44, 42, 40, 38, 36, 35, 33, 32,
    30, 29, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 15, 14, 13, 13, 12,
    12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5,
]  # fmt: skip


@pytest.mark.parametrize(
    ("num_classes", "largest", "totals"),
    [
        (100, 500, {200: 9502, 100: 10847, 50: 12608, 20: 15907, 10: 19573}),
        (10, 5000, {200: 11203, 100: 12406, 50: 13996, 20: 17023, 10: 20431}),
    ],
)
def test_totals_are_the_published_ones(num_classes, largest, totals):
    assert {ratio: long_tailed_counts(num_classes, largest, ratio).sum() for ratio in totals} == totals


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        (50, [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]),
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
    ],
)
def test_cifar10_counts_are_the_published_ones(ratio, counts):
    assert long_tailed_counts(10, 5000, ratio).tolist() == counts


def test_cifar100_counts_are_the_published_ones():
    assert long_tailed_counts(100, 500, 100).tolist() == CIFAR100_RATIO_100


@pytest.mark.parametrize(
    ("ratio", "sizes"),
    [
        (200, (30, 31, 39)),
        (100, (35, 35, 30)),
        (50, (41, 41, 18)),
        (20, (53, 47, 0)),
        (10, (69, 31, 0)),
    ],
)
def test_cifar100_groups_have_the_published_sizes(ratio, sizes):
    counts = long_tailed_counts(100, 500, ratio)
    assert ((counts > 100).sum(), ((counts >= 20) & (counts <= 100)).sum(), (counts < 20).sum()) == sizes


def test_step_has_two_sizes():
    assert long_tailed_counts(5, 500, 100, "step").tolist() == [500, 500, 5, 5, 5]


@pytest.mark.parametrize("ratio", [10, 100, 200])
@pytest.mark.parametrize(
    ("num_classes", "per_class", "first_five"),
    [
        (
            100,
            500,
            {
                0: [90, 254, 283, 445, 461],
                1: [277, 307, 436, 88, 261],
                50: [307, 484, 149, 423, 351],
                99: [348, 153, 363, 361, 299],
            },
        ),
        (
            10,
            5000,
            {
                0: [398, 3833, 4836, 4572, 636],
                1: [597, 332, 521, 3935, 4800],
                5: [4127, 1152, 4595, 4590, 2270],
                9: [2204, 3816, 2206, 2507, 1926],
            },
        ),
    ],
)
def test_selected_images_are_the_published_ones(num_classes, per_class, first_five, ratio):
    """The selection depends on labels alone, so CIFAR is not needed. Ranks are within a class, in file order."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(num_classes), per_class))
    train = select(labels, num_classes, imbalance_ratio=ratio, max_per_class=per_class).train
    starts = np.concatenate([[0], np.cumsum(long_tailed_counts(num_classes, per_class, ratio))])
    for c, expected in first_five.items():
        chosen = train[starts[c] : min(starts[c] + 5, starts[c + 1])]
        assert (labels[chosen] == c).all()
        assert np.searchsorted(np.flatnonzero(labels == c), chosen).tolist() == expected[: len(chosen)]


def test_the_selection_of_a_smaller_ratio_contains_that_of_a_larger_one():
    labels = np.repeat(np.arange(10), 50)
    small, large = (set(select(labels, 10, imbalance_ratio=r, max_per_class=50).train.tolist()) for r in (5, 25))
    assert large < small


def test_balanced_cifar100_has_108_images_of_each_class():
    """10,847 / 100 = 108.47."""
    labels = np.repeat(np.arange(100), 500)
    train = select(labels, 100, imbalance_ratio=100, max_per_class=500, balanced=True).train
    assert np.bincount(labels[train]).tolist() == [108] * 100


def test_a_balanced_set_that_needs_more_images_than_there_are_is_refused():
    """(60 + 20) / 2 = 40 images of class 1 are needed, 20 exist."""
    labels = np.repeat([0, 1], [60, 20])
    with pytest.raises(ValueError, match=r"dataset.balanced = true .total 80. needs 40 images of class 1, found 20"):
        select(labels, 2, balanced=True)


def test_the_validation_set_is_the_same_for_every_ratio_and_disjoint_from_training():
    labels = np.repeat(np.arange(4), 30)
    cuts = [select(labels, 4, imbalance_ratio=r, max_per_class=30, val_per_class=5) for r in (1, 3, 10)]
    for cut in cuts:
        assert cut.val.tolist() == cuts[0].val.tolist()
        assert np.bincount(labels[cut.val]).tolist() == [5] * 4
        assert not set(cut.val.tolist()) & set(cut.train.tolist())
    assert np.bincount(labels[cuts[2].train]).tolist() == [25, 13, 6, 3], "30 images shrink to 25, the others stay"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"imbalance_ratio": 10, "max_per_class": 31},
            r"needs 31 images of class 0, found 30.*lower dataset.max_per_cl",
        ),
        (
            {"imbalance_ratio": 100, "max_per_class": 30},
            r"class 3 would have no training image.*dataset.imbalance_ratio=null keeps",
        ),
        (
            {"val_per_class": 30},
            r"class 0 would have no training image: dataset.val_per_class = 30 takes all of its 30",
        ),
    ],
)
def test_too_few_images_are_refused_by_class_and_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(np.repeat(np.arange(4), 30), 4, **arguments)


def test_natural_counts_may_be_capped():
    labels = np.repeat([0, 1, 2], [9, 5, 2])
    assert np.bincount(labels[select(labels, 3, max_per_class=5).train]).tolist() == [5, 5, 2]


def test_a_held_out_test_set_has_equal_classes_and_no_training_image():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [9, 5, 4]))
    stay, out = hold_out(labels, 3, 3, "test_per_class")
    assert np.bincount(labels[out]).tolist() == [3, 3, 3]
    assert sorted([*stay, *out]) == list(range(18))
    with pytest.raises(ValueError, match=r"dataset.test_per_class = 4: class 2 has 4 images and needs at least 5"):
        hold_out(labels, 3, 4, "test_per_class")
