import pytest

from aggregation.metrics import FEW_BELOW, MANY_ABOVE, groups_by_count, groups_by_index
from orchestration.results.tables import (
    _COUNT_RULE,
    final_table,
    members,
    passes_saved,
    per_class_table,
    selection_note,
    shown_members,
)

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
    for words in ("RIDE", "seed 3", "740 training images of 5 classes, 500 to 19 per class", "10,000 images"):
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
    [("test", "best was chosen on TEST: optimistic"), ("val", "best was chosen on val; test was not used")],
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


def test_the_table_of_classes_has_one_row_per_class():
    table = per_class_table({"last": evaluation(0.5)}, data())
    assert table["columns"] == [
        "class", "name", "train_images", "group_by_count", "group_by_index", "last/ensemble", "last/expert0",
    ]  # fmt: skip
    assert table["data"][0] == [0, "c0", 500, "many", "many", 0.5, 0.5]
    assert table["data"][4] == [4, "c4", 19, "few", "few", None, None]


GROUPS = ("all", "many", "medium", "few", "many_by_index", "medium_by_index", "few_by_index")


def diversity(value, names=("expert0", "expert1"), **more):
    """Make a diversity whose shares are all `value`, and whose divergences are `value` times 1, 2, ..."""
    by_group = dict.fromkeys(GROUPS, value) | more
    return {
        "num_experts": len(names), "experts": list(names), "pairs": [],
        **dict.fromkeys(("disagreement", "agreement", "mean_divergence", "error", "bias", "variance"), by_group),
        "divergence": {name: dict.fromkeys(GROUPS, value * k) for k, name in enumerate(names, 1)},
    }  # fmt: skip


def test_how_different_the_experts_are_is_shown_by_group():
    last = evaluation(0.5) | {"diversity": diversity(0.25, few=None)}
    text = final_table({"last": last, "best": evaluation(0.5) | {"diversity": diversity(0.125)}}, data())
    for label in ("pairs that disagree, %", "all agree, %", "error of an expert, %", "bias, %", "variance, %"):
        line = next(line for line in text.splitlines() if line.startswith(label))
        assert line.removeprefix(label).split() == ["25.00", "12.50"] * 3 + ["n/a", "12.50"]
    line = next(line for line in text.splitlines() if line.startswith("KL(mean || expert1), nats"))
    assert line.split()[-8:] == ["0.5000", "0.2500"] * 4
    assert "bias: the experts' majority vote is wrong" in text


def test_an_old_evaluation_is_shown_without_diversity():
    text = final_table({"last": evaluation(0.5) | {"diversity": diversity(0.25)}, "best": evaluation(0.5)}, data())
    assert next(line for line in text.splitlines() if line.startswith("bias, %")).split()[2:] == ["25.00", "n/a"] * 4
    assert "bias" not in final_table({"last": evaluation(0.5)}, data())


def test_a_single_expert_has_no_diversity():
    alone = evaluation(0.5) | {"diversity": diversity(0.0, ("expert0",)) | {"disagreement": None}}
    assert "disagree" not in final_table({"last": alone}, data())


def test_experts_asked_and_passes_saved_are_shown():
    """Of 4 experts 2.5 are asked: 1.5 of 4 passes are saved."""
    used = dict.fromkeys(GROUPS, 2.5) | {"few": None}
    four = diversity(0.25, tuple(f"expert{k}" for k in range(4)))
    routed = evaluation(0.5) | {"per_image": {"experts_used": used}, "diversity": four}
    assert passes_saved(routed) == dict.fromkeys(GROUPS, 0.375) | {"few": None}
    lines = final_table({"last": routed}, data()).splitlines()
    assert next(line for line in lines if line.startswith("experts used")).split()[2:] == ["2.500"] * 3 + ["n/a"]
    saved = next(line for line in lines if line.startswith("expert passes saved, %"))
    assert saved.split()[-4:] == ["37.50"] * 3 + ["n/a"]
    assert passes_saved(evaluation(0.5)) == passes_saved(evaluation(0.5) | {"per_image": {}}) == {}
    assert "Per image" not in final_table({"last": evaluation(0.5) | {"per_image": {}}}, data())


def test_members_that_the_ensemble_is_compared_with_have_their_rows():
    routed = evaluation(0.5)
    routed["members"] = {
        "ensemble": routed["members"]["ensemble"],
        "all experts": evaluation(0.75)["members"]["ensemble"],
    }
    text = final_table({"last": routed}, data())
    assert row(text, "all experts")[2:] == ["75.00"] * 4
    assert per_class_table({"last": routed}, data())["columns"][-2:] == ["last/ensemble", "last/all experts"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"expert0": [1, 2], "ensemble": [1, 2]}, ["ensemble"]),
        ({"expert0": [1, 3], "ensemble": [1, 2]}, ["ensemble", "expert0"]),
        ({"b": 1, "a": 1, "ensemble": 1}, ["ensemble", "b", "a"]),
        ({"ensemble": 1}, ["ensemble"]),
        ({}, []),
    ],
)
def test_one_expert_is_shown_where_it_differs_from_the_ensemble(values, shown):
    assert shown_members(values) == shown
