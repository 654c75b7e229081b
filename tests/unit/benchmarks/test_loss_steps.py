"""The costs of steps: the document is what was measured, and every loss of the study is measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import loss_steps
from orchestration.config.words import available


def test_the_document_shows_the_steps_that_were_measured():
    if not loss_steps.RESULTS.exists():
        pytest.skip("no results yet: python -m benchmarks.loss_steps")
    rows = json.loads(loss_steps.RESULTS.read_text())["rows"]
    assert rows.keys() == loss_steps.ROWS.keys()
    assert loss_steps.documented(loss_steps.DOCS.read_text(), rows) == loss_steps.DOCS.read_text()


def test_step_times_are_measured_for_every_mixing():
    assert {mix for mix in ("mixup", "remix", "cutmix", "cmo") if mix in available("mix")} <= loss_steps.ROWS.keys()
