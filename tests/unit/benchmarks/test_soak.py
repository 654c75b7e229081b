"""The soak on a run that lost no worker, and on one that fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.soak import killed_at_end, recoveries_of


def test_a_run_that_lost_no_worker_has_no_recoveries():
    assert recoveries_of({"status": "stopped"}) == {"failures": 0, "steps_again": 0, "recovery_s": None}
    lost = {"failures": 2, "recoveries": [{"seconds": {"total": s}, "steps_again": 3} for s in (1.0, 4.0)]}
    assert recoveries_of(lost) == {"failures": 2, "steps_again": 6, "recovery_s": {"median": 2.5, "most": 4.0}}


def test_no_run_is_left_behind_by_an_assertion():
    with pytest.raises(AssertionError), killed_at_end(subprocess.Popen([sys.executable, "-c", "input()"])) as process:
        raise AssertionError
    assert process.returncode is not None
