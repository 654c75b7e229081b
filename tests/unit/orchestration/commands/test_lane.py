"""The text that a lane keeps of a run."""

from __future__ import annotations

import pytest

from orchestration.commands.lane import LOG_FILE, _output_to, _problem

URI = "http://me:s3cret@host:5000"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_problem_is_told_and_kept_without_a_password(kind, tmp_path, capfd):
    with capfd.disabled(), _output_to(tmp_path / LOG_FILE):
        try:
            raise kind(f"tracking.uri={URI}: 1 problem")
        except kind as problem:
            outcome = _problem(problem)
    said = (tmp_path / LOG_FILE).read_text()
    assert "http://host:5000: 1 problem" in said and "s3cret" not in said
    assert "http://host:5000: 1 problem" in outcome["problem"] and "s3cret" not in outcome["problem"]
