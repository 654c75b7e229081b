"""The benchmark of the demo: it runs what `make demo` runs, and its stored numbers are those of the demo's schedule."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.demo import OUT, WORDS
from orchestration.config.compose import load_config

ROOT = Path(__file__).resolve().parents[3]


def test_make_demo_runs_what_was_measured():
    (line,) = re.findall(r"expertail train (.+) run\.name=demo$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split() == WORDS


def test_the_ensemble_of_the_demo_leads_its_best_expert_over_three_seeds():
    record = json.loads(OUT.read_text())
    assert record["command"].split()[2:-1] == WORDS
    assert record["epochs"] == load_config(WORDS).method.stages["train"].epochs
    assert record["seeds"].keys() == {"0", "1", "2"}
    for which in ("last", "best"):
        leads = record["lead"][which]
        assert leads["mean"] > 0 and min(leads["seeds"]) >= 0
