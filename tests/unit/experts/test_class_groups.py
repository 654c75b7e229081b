"""Cutting classes into groups, by numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.class_groups import GroupRule, nested_targets, split_classes


def split(counts, num_groups=3, **rule):
    return [group.tolist() for group in split_classes(torch.tensor(counts), num_groups, GroupRule(**rule))]


def test_by_count_the_borders_belong_to_medium():
    """More than 100 is many, fewer than 20 is few."""
    assert split([101, 100, 20, 19]) == [[0], [1, 2], [3]]


def test_lfmes_borders_belong_to_many_and_few():
    assert split([100, 99, 21, 20], many_above=99, few_below=21) == [[0], [1, 2], [3]]


def test_groups_are_sorted_by_falling_count_and_ties_by_class_id():
    assert split([5, 300, 50, 7, 200, 50, 5]) == [[1, 4], [2, 5], [3, 0, 6]]


def test_into_two_by_count_are_many_and_the_rest():
    assert split([5, 300, 50, 19], num_groups=2) == [[1], [2, 3, 0]]


@pytest.mark.parametrize(
    ("num_groups", "sizes"), [(2, [5, 5]), (3, [4, 3, 3]), (4, [3, 3, 2, 2]), (10, [1] * 10)], ids=str
)
def test_equal_groups_are_those_of_array_split(num_groups, sizes):
    groups = split(list(range(10, 0, -1)), num_groups, rule="equal")
    assert [len(group) for group in groups] == sizes
    assert [c for group in groups for c in group] == list(range(10))


def test_by_index_the_sorted_list_is_cut():
    assert split([1, 2, 3, 4, 5], rule="index", cuts=(1, 3)) == [[4], [3, 2], [1, 0]]
    assert split([9, 9, 9, 9], 2, rule="index", cuts=(3,)) == [[0, 1, 2], [3]]


def test_counts_may_be_an_array_and_groups_are_int64():
    groups = split_classes(np.array([500, 50, 5], dtype=np.int32), 3, GroupRule())
    assert [group.dtype for group in groups] == [np.int64] * 3


@pytest.mark.parametrize(
    ("counts", "num_groups", "rule", "message"),
    [
        (
            [500, 50, 20],
            3,
            {},
            r"no class is few \(fewer than groups\.few_below = 20 .*20 to 500 .* 3 classes; set .*equal",
        ),
        ([100, 50, 5], 3, {}, r"no class is many \(more than groups\.many_above = 100"),
        ([500, 101, 5], 3, {}, r"no class is medium \(20 to 100"),
        ([500, 101, 200], 2, {}, r"no class is without being many \(at most groups\.many_above = 100"),
        ([500, 50, 5, 1], 4, {}, r"groups\.rule = 'count' gives 3 .*, needed 4; set groups\.rule = 'equal'.* 3 groups"),
        ([500, 50, 5], 3, {"many_above": 10, "few_below": 12}, r"few_below must be at most many_above \+ 1"),
        ([5, 4], 3, {"rule": "equal"}, r"2 classes do not fill 3 groups; use fewer experts"),
        ([5, 4, 3], 3, {"rule": "index"}, r"groups\.cuts = none: .*needs 2 rising numbers between 1 and 2"),
        ([5, 4, 3], 3, {"rule": "index", "cuts": (1,)}, r"groups\.cuts = 1: .*needs 2 rising numbers"),
        ([5, 4, 3], 3, {"rule": "index", "cuts": (2, 1)}, r"groups\.cuts = 2, 1"),
        ([5, 4, 3], 3, {"rule": "index", "cuts": (1, 3)}, r"groups\.cuts = 1, 3"),
        ([5, 4, 3], 3, {"rule": "index", "cuts": (0, 1)}, r"groups\.cuts = 0, 1"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_to_set(counts, num_groups, rule, message):
    with pytest.raises(ValueError, match=message):
        split(counts, num_groups, **rule)


@pytest.mark.parametrize("settings", [{"many_above": -1}, {"few_below": -1}, {"rule": "size"}, {"cut": (1,)}], ids=str)
def test_bad_settings_are_refused_by_key(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GroupRule(**settings)


def test_nested_targets_drop_a_group_at_a_time():
    targets = nested_targets(torch.tensor([5, 500, 50]), 3, GroupRule())
    assert targets.tolist() == [[True, True, True], [True, False, True], [True, False, False]]
