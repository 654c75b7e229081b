"""Who holds a lock is told without touching it: a living process, none that has ended, no younger one of its number."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time

import pytest

from orchestration.storage.holders import holder


def noted(path, pid, host=None, age_s=0.0):
    path.write_text(f"process {pid} on {platform.node() if host is None else host}\ntoken\n")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_living_process_holds_and_one_that_has_ended_does_not(tmp_path):
    assert holder(noted(tmp_path / ".lock", os.getpid())) == f"process {os.getpid()} on {platform.node()}"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert holder(noted(tmp_path / ".lock", ended.pid)) is None


def test_a_younger_process_with_the_number_of_one_that_has_ended_does_not_hold(tmp_path):
    assert holder(noted(tmp_path / ".lock", os.getpid(), age_s=10 * 365 * 86400)) is None


def test_a_process_of_another_host_is_told_to_be_out_of_sight(tmp_path):
    assert holder(noted(tmp_path / ".lock", 1, "elsewhere")) == (
        "process 1 on elsewhere, if it still lives: that host cannot be looked at from here"
    )


@pytest.mark.parametrize("content", [None, "", "something else\n", "process x on y\n"])
def test_a_lock_without_a_holder_has_none(content, tmp_path):
    if content is not None:
        (tmp_path / ".lock").write_text(content)
    assert holder(tmp_path / ".lock") is None
