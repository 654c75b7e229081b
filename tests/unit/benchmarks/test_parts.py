"""Parts of a study that were trained apart make the table that the whole makes; parts that do not fit are refused."""

from __future__ import annotations

import copy
import random

import pytest

from benchmarks.parts import joined
from benchmarks.tables import GROUPS, REAL, kept
from orchestration.reports.compare import verdict
from orchestration.reports.statistics import mean_and_sd, paired_interval

LABELS = ("ce", "tade", "ride")
DATA = {"name": "d", "digest": "1", "classes": 10, "images": 9, "group_sizes": {}}


def accuracy(label, seed, group):
    return round(random.Random(f"{label} {seed} {group}").gauss(0.2 + 0.3 * (label == "tade"), 0.01), 6)


def report(runs):
    """Return a report of runs, as (label, seed), and its study."""
    rows = []
    for label in LABELS:
        seeds = sorted(seed for name, seed in runs if name == label)
        if not seeds:
            continue
        measures, differences = {}, {}
        for group in GROUPS:
            by_seed = {str(seed): accuracy(label, seed, group) for seed in seeds}
            mean, sd = mean_and_sd(list(by_seed.values()))
            measures[group] = {"mean": mean, "sd": sd, "by_seed": by_seed}
            both = [
                accuracy(label, seed, group) - accuracy("ce", seed, group) for seed in seeds if ("ce", seed) in runs
            ]
            if label != "ce" and both:
                words = verdict(len(both), paired_interval(both), None)
                differences[group] = {"mean": mean_and_sd(both)[0], "words": words, "over_images": None}
        cost = {"parameters": 7, "inference": 9.4e6, "training": 1.36e12, "teachers": False}
        made = [{"run": f"{label}-s{seed}", "commit": f"c{seed}"} for seed in seeds]
        rows.append({"label": label, "seeds": seeds, "runs": made, "cost": cost, "differences": differences,
                     "measures": measures})  # fmt: skip
    table = {"data": DATA, "schedule": {"epochs": 15}, "seeds": sorted({seed for _, seed in runs}), "rows": rows,
             "baseline": "ce" if any(label == "ce" for label, _ in runs) else None}  # fmt: skip
    made_with = {"commit": {f"c{seed}": sum(s == seed for _, s in runs) for _, seed in sorted(runs)}}
    every = [{"run": f"{label}-s{seed}"} for label in LABELS for seed in (0, 1, 2)]
    return {"title": "s", "tables": [table], "made_with": made_with, "missing": []}, {"points": every}


def of(*runs):
    made = {"runs": {f"{label}-s{seed}": f"m{seed}" for label, seed in runs}}
    return kept(*report(runs), {**made, "makers": {f"m{seed}": {"commit": f"c{seed}"} for _, seed in runs}})


def test_parts_trained_apart_are_as_the_whole_trained_at_once():
    whole = of(*((label, seed) for label in LABELS for seed in (0, 1, 2)))
    words = {one["words"] for row in whole["rows"] for one in row["differences"].values()}
    assert words == {REAL, "not told apart by 3 seeds"}
    parts = [
        of(("ce", 0), ("ce", 1), ("ride", 0)),
        of(("ride", 2), ("ride", 1)),
        of(("ce", 1), ("ce", 2), ("tade", 2)),
        of(("tade", 0), ("tade", 1)),
    ]
    found = parts[0]
    for part in parts[1:]:
        found = joined(found, part, str, LABELS)
        assert joined(found, part, str, LABELS) == found, "a part may be joined again"
    assert found.pop("made_before") == {} and found == whole


def test_results_without_makers_count_among_what_made_them():
    old = {key: value for key, value in of(("ce", 0), ("ce", 1)).items() if key not in ("runs", "makers")}
    for _ in range(2):  # the same part again, grown
        old = joined(old, of(("ce", 2), ("ride", 2)), str, LABELS)
        assert old["made_with"]["commit"] == {"c0": 1, "c1": 1, "c2": 2}


def test_a_baseline_may_come_later_and_what_no_part_has_trained_is_untrained():
    first = of(("ride", 0), ("ride", 1))
    assert first["baseline"] is None and first["untrained"] == ["ce", "tade"]
    found = joined(first, of(("ce", 0), ("ce", 1)), str, LABELS)
    assert found["baseline"] == "ce" and found["untrained"] == ["tade"]
    assert found["rows"] == of(("ce", 0), ("ce", 1), ("ride", 0), ("ride", 1))["rows"]


def test_a_bootstrap_of_a_part_still_tells_whether_test_images_could_be_the_cause():
    part = of(("ce", 1), ("ce", 2), ("tade", 1), ("tade", 2))
    part["rows"][1]["differences"]["few"]["over_images"] = [-0.1, 0.5]
    found = joined(of(("ce", 0), ("tade", 0)), part, str, LABELS)
    words = {group: one["words"] for group, one in found["rows"][1]["differences"].items()}
    assert words.pop("few") == "not told apart by the test images" and set(words.values()) == {REAL}


def test_what_is_of_other_data_or_was_measured_otherwise_is_refused():
    ours, theirs = of(("ce", 0)), of(("ce", 0), ("ce", 1))
    for key, value in (("data", {**DATA, "digest": "2"}), ("schedule", {"epochs": 40})):
        with pytest.raises(ValueError, match=f"its {key} is .*; kept is .*; needed the same"):
            joined(ours, {**theirs, key: value}, str, LABELS)
    other = copy.deepcopy(theirs)
    other["rows"][0]["top1"]["few"]["by_seed"]["0"] += 0.01
    with pytest.raises(ValueError, match=r"ce, seed 0, few: found .*, kept is .*, of commits c0; needed the same"):
        joined(ours, other, str, LABELS)
