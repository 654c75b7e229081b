"""The uploader runs beside the driver, which must stay light."""

from __future__ import annotations

import os
import queue
import subprocess
import sys

import pytest

from orchestration.config.paths import code_root
from orchestration.tracking.uploader import start_uploader


@pytest.fixture
def uploading_by(tmp_path, monkeypatch):
    """Start an uploader whose process runs shell commands; returns it, and the queue of what it reports."""

    def start(commands, uri):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{commands}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        said = queue.SimpleQueue()
        return start_uploader(tmp_path, uri, report=said.put), said

    return start


def test_importing_the_driver_side_does_not_import_mlflow():
    ours = "orchestration.tracking.uploader, orchestration.tracking.sender"
    code = f"import {ours}, sys; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=code_root())


def test_an_uploader_that_ends_by_itself_is_reported_at_once(uploading_by, tmp_path):
    """Not at the end of a run of days. At the end `finish` says it again, as what is missing then."""
    uploader, said = uploading_by("echo 'OSError: no room for http://me:s3cret@h' >&2\nexit 3", "http://me:s3cret@h")
    line = said.get(timeout=30)
    assert "(the uploader ended with code 3, OSError: no room for http://h)" in line
    assert f"later: expertail sync {tmp_path}" in line and line.endswith("; training goes on")
    assert "ended with code 3" in uploader.finish(1.0)
    assert said.empty()


def test_what_the_uploader_cannot_mend_is_reported_while_it_goes_on(uploading_by):
    uploader, said = uploading_by("echo 'the experiment is deleted' > /dev/fd/$5\ncat > /dev/null", "http://h")
    assert "(the experiment is deleted)" in said.get(timeout=30)
    assert uploader.finish(30.0) is None
    assert said.empty()


def test_an_uploader_that_cannot_start_leaves_no_file_open(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        start_uploader(tmp_path, "http://h")
    assert os.listdir("/proc/self/fd") == before
