"""A plan, and a run that starts, say first what the command line scaled."""

from __future__ import annotations

import contextlib

from orchestration import cli
from orchestration.cluster import early_ray
from orchestration.commands import train
from orchestration.commands.plan import plan_text

SHORT = ["method=ce", "dataset=digits_lt", "method.stages.train.epochs=12"]
NOTE = "stage train: 12 instead of 24 epochs; scaled: lr_schedule.warmup_epochs 2; lr_schedule.milestones 10, 11"


def test_a_plan_says_what_a_shorter_run_scales(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    first, empty, second = plan_text(SHORT).splitlines()[:3]
    assert (first, empty, second) == (NOTE, "", "run")
    assert plan_text(SHORT[:2]).startswith("run\n")


def test_so_does_training_in_its_first_line(monkeypatch, capsys):
    monkeypatch.setattr(early_ray, "early_ray", lambda words: contextlib.nullcontext())
    monkeypatch.setattr(train, "train_and_report", lambda *_: 0)
    assert cli.main(["train", *SHORT]) == 0
    assert capsys.readouterr().err == f"expertail: {NOTE}\n"
