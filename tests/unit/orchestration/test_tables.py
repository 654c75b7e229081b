import pytest

from aggregation.metrics import FEW_BELOW, MANY_ABOVE, groups_by_count, groups_by_index
from orchestration.tables import _COUNT_RULE, final_table, members, per_class_table, selection_note

COUNTS = [500, 101, 100, 20, 19]


def data(counts=COUNTS, cuts=(1, 3)):
    def plain(groups):
        return {name: ids.tolist() for name, ids in groups.items()}

    return {
        "dataset": "tiny", "class_names": [f"c{i}" for i in range(len(counts))], "counts": counts,
        "groups": {
            "by_count": plain(groups_by_count(counts)),
            "by_index": plain(groups_by_index(counts, cuts)) if cuts else None,
        },
    }  # fmt: skip


def evaluation(value, selected_on="test", **more):
    groups = ("all", "many", "medium", "few", "many_by_index", "medium_by_index", "few_by_index")
    member = {"top1": dict.fromkeys(groups, value) | more, "nll": 1.25, "ece": 0.0375}
    member["per_class"] = [value] * 4 + [None]
    return {
        "split": "test", "selected_on": selected_on, "stage": "train", "epoch": 7, "step": 700, "num_images": 10000,
        "members": {"expert0": member, "ensemble": member},
    }  # fmt: skip


def row(text, member, block=0):
    return [line.split() for line in text.splitlines() if line.startswith(member)][block]


def test_last_and_best_stand_side_by_side_for_every_member_and_group():
    text = final_table({"best": evaluation(0.7525), "last": evaluation(0.5, few=None)}, data(), title="RIDE", seed=3)
    assert row(text, "ensemble") == ["ensemble", *("50.00 75.25".split() * 3), "n/a", "75.25"]
    assert row(text, "expert0", 1) == ["expert0", *("50.00 75.25".split() * 3)]
    assert row(text, "ensemble", 2) == ["ensemble", "1.2500", "1.2500", "3.75", "3.75"]
    by_count, by_index = ["many > 100 [2]", "medium 20-100 [2]", "few < 20 [1]"], ["many 0-0 [1]", "few 3-4 [2]"]
    for heading in by_count + by_index:
        assert heading in text
    for words in ("RIDE", "seed 3", "740 training images of 5 classes, 500 to 19 a class", "10,000 images"):
        assert words in text
    assert "last: stage train, epoch 7, step 700, measured on test" in text


def test_the_headings_say_the_rule_that_the_groups_follow():
    rule = {"many": f"> {MANY_ABOVE}", "medium": f"{FEW_BELOW}-{MANY_ABOVE}", "few": f"< {FEW_BELOW}"}
    assert rule == _COUNT_RULE


def test_lines_are_plain_and_aligned():
    text = final_table({"last": evaluation(1.0), "best": evaluation(0.001)}, data())
    assert "\x1b" not in text
    lines = text.splitlines()
    assert all(line == line.rstrip() for line in lines)
    for start, line in enumerate(lines):
        if line.startswith("---"):
            assert len(line) == len(lines[start + 1]) == len(lines[start - 1])


@pytest.mark.parametrize(
    ("selected_on", "words"),
    [("test", "best was chosen on TEST: optimistic"), ("val", "best was chosen on val; test was not looked at")],
)
def test_the_split_that_chose_best_is_named(selected_on, words):
    assert words in final_table({"best": evaluation(0.5, selected_on)}, data())
    assert selection_note(None) == ""


def test_a_run_without_evaluation_or_index_groups_still_has_a_table():
    assert "no evaluation yet" in final_table({}, data())
    without = {f"{group}_by_index": None for group in ("many", "medium", "few")}
    text = final_table({"last": evaluation(0.5, **without)}, data(cuts=None))
    assert "by index" not in text
    assert row(text, "ensemble")[1:] == ["50.00"] * 4


def test_members_are_the_ensemble_first_and_each_once():
    assert members({"last": evaluation(1), "best": evaluation(1)}) == ["ensemble", "expert0"]


def test_the_table_of_classes_has_one_row_a_class():
    table = per_class_table({"last": evaluation(0.5)}, data())
    assert table["columns"] == [
        "class", "name", "train_images", "group_by_count", "group_by_index", "last/ensemble", "last/expert0",
    ]  # fmt: skip
    assert table["data"][0] == [0, "c0", 500, "many", "many", 0.5, 0.5]
    assert table["data"][4] == [4, "c4", 19, "few", "few", None, None]
