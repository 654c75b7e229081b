"""The uploader runs beside the driver, which must stay light."""

from __future__ import annotations

import queue
import sys

from orchestration.config.paths import code_root
from orchestration.tracking.uploader import start_uploader


def test_importing_the_driver_side_does_not_import_mlflow():
    import subprocess

    ours = "orchestration.tracking.uploader, orchestration.tracking.sender"
    code = f"import {ours}, sys; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=code_root())


def test_an_uploader_that_ends_by_itself_is_reported_at_once(tmp_path, monkeypatch):
    """Not at the end of a run of days. At the end `finish` says it again, as what is missing then."""
    dying = tmp_path / "dying"
    dying.write_text("#!/bin/sh\necho 'OSError: no room for http://me:s3cret@h' >&2\nexit 3\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    said = queue.SimpleQueue()
    uploader = start_uploader(tmp_path, "http://me:s3cret@h", report=said.put)
    line = said.get(timeout=30)
    assert "(the uploader ended with code 3, OSError: no room for http://h)" in line
    assert f"later: expertail sync {tmp_path}" in line and line.endswith("; training goes on")
    assert "ended with code 3" in uploader.finish(1.0)
    assert said.empty()


def test_what_the_uploader_cannot_mend_is_reported_while_it_goes_on(tmp_path, monkeypatch):
    waiting = tmp_path / "waiting"
    waiting.write_text("#!/bin/sh\necho 'the experiment is deleted' > /dev/fd/$5\ncat > /dev/null\n")
    waiting.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(waiting))
    said = queue.SimpleQueue()
    uploader = start_uploader(tmp_path, "http://h", report=said.put)
    assert "(the experiment is deleted)" in said.get(timeout=30)
    assert uploader.finish(30.0) is None
    assert said.empty()
