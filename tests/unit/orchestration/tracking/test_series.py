"""What a series of uploads tells the study: runs that were not sent, once and with what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from orchestration.tracking import series
from orchestration.tracking.process import Target
from orchestration.tracking.uploader import instead

SAYS = """
import json, os, sys
for line in sys.stdin:
    if "run_dir" in json.loads(line):
        problem = {"run_dir": "runs/s/ce-s0", "problem": "ConnectionError: no answer"}
        os.write(int(sys.argv[1]), json.dumps(problem).encode() + b"\\n")
"""
HANGS = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("program", "line"),
    [
        (SAYS, "tracking: the upload of 2 runs failed, first with ConnectionError: no answer"),
        (HANGS, "tracking: not all runs were uploaded after 1 s"),
    ],
)
def test_what_was_not_sent_is_told_once_at_the_end(program, line, tmp_path, monkeypatch):
    monkeypatch.setattr(series, "_LAST_WAIT_S", 0.0 if program is HANGS else 20.0)

    def start(writes, path):
        return subprocess.Popen([sys.executable, "-c", program, str(writes)], stdin=subprocess.PIPE, pass_fds=(writes,))

    monkeypatch.setattr(series, "_start", start)
    told = []
    with series.one_uploader(told.append, "runs/s"):
        for name in ("ce-s0", "ce-s1"):
            instead[-1](tmp_path / name, Target("sqlite://", "e", name), print).finish(1.0)
        assert not told
    assert told == [f"{line}; later: expertail sync runs/s"]
