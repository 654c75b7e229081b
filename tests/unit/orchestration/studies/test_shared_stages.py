"""Stages that several runs share are found by digests, and their journals are merged."""

from __future__ import annotations

import numpy as np
import pytest

from orchestration.config.compose import load_config
from orchestration.storage.journal import Journal, read_journal
from orchestration.studies.shared_stages import merge_journals, untouched_stages

RATIO = "method.stages.h2t.flow.ratio"


def compose(*words):
    return load_config(["dataset=digits_lt", *words])


@pytest.mark.parametrize(
    ("method", "words", "expected"),
    [
        ("ride_h2t", [f"{RATIO}=0.9"], ["train"]),
        ("ride_h2t", ["method.stages.h2t.optimizer.lr=0.5"], ["train"]),
        ("ride_h2t", ["run.dir=elsewhere", "method.stages.h2t.epochs=3", "cluster.workers=3"], ["train"]),
        ("ride_h2t", ["method.stages.train.epochs=3"], []),
        ("ride_h2t", ["seed=1"], []),
        ("ride_h2t", [f"{RATIO}=0.9", "backbone=resnet14"], []),
        ("ride_h2t", [f"{RATIO}=0.9", "run.evaluate_every_epochs=2"], []),
        ("lfme", ["method.stages.student.epochs=3"], ["many", "medium", "few"]),
        ("lfme", ["method.stages.medium.epochs=3"], ["many", "few"]),
        ("ride_router", ["method.stages.router.epochs=3"], ["train"]),
    ],
)
@pytest.mark.slow
def test_stages_that_neither_differ_nor_build_on_one_that_does_are_shared(method, words, expected):
    one, other = compose(f"method={method}"), compose(f"method={method}", *words)
    assert untouched_stages(one, other) == untouched_stages(other, one) == expected
    assert untouched_stages(one, one) == list(one.method.stages)


def test_parts_side_by_side_share_the_stage_that_they_start_from():
    crt, ncm = compose("method=ce", "then=crt"), compose("method=ce", "then=ncm")
    assert untouched_stages(crt, ncm) == untouched_stages(ncm, crt) == ["train"]
    assert untouched_stages(crt, compose("method=ldam", "then=crt")) == []


def test_a_merged_journal_has_the_taken_stages_and_our_own_lines_of_the_others(tmp_path):
    donor, ours = tmp_path / "donor", tmp_path / "ours"
    with Journal(donor) as journal:
        journal.append("a", 1, 1, {"train/loss": 1.0, "train/x": float("nan")}, time=5.0)
        journal.append("b", 1, 1, {"train/loss": 2.0}, time=6.0)
    with Journal(ours) as journal:
        journal.append("c", 1, 1, {"train/loss": 3.0}, time=1.0)
        journal.append("a", 1, 1, {"train/loss": 9.0}, time=2.0)
    for _ in range(2):  # again after a kill
        merge_journals(donor, ours, ["a", "b", "c"], {"a"})
        found = [(r.stage, r.name, r.value, r.time) for r in read_journal(ours)]
        assert found[0] == ("a", "train/loss", 1.0, 5.0) and np.isnan(found[1][2])
        assert found[2:] == [("c", "train/loss", 3.0, 1.0)]
