"""Start and end the process that uploads a run to MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestration.config.paths import code_root
from orchestration.tracking.process import (
    State,
    Target,
    incomplete,
)
from orchestration.tracking.uri import check_uri

LOG_FILE = "tracking.log"


def start_uploader(
    run_dir: str | os.PathLike[str],
    uri: str,
    experiment: str = "expertail",
    run_name: str | None = None,
) -> Uploader:
    """Start the process that uploads a run while it trains. Returns at once: nothing is imported, nothing is connected.

    Args:
        run_dir: the run folder, with `config.yaml`, `run.json` and `data.json` as far as they are known; or a study's.
        uri: of the tracking store; `default_uri(runs_dir)` where the operator named none.
        experiment: MLflow experiment; made when missing.
        run_name: name of the MLflow run; the folder's name when not given.

    Raises:
        ValueError: the URI is not one of a tracking store.
    """
    run_dir = Path(run_dir)
    target = Target(check_uri(uri), experiment, run_name or run_dir.name)
    root = str(code_root())
    roots = [] if root == sysconfig.get_path("purelib") else [root]  # a checkout that is not installed
    path = os.pathsep.join(roots + list(filter(None, [os.environ.get("PYTHONPATH")])))
    with open(run_dir / LOG_FILE, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestration.tracking.sender", str(run_dir)],
            stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,  # Ctrl-C is for the driver; and priorities count within a session
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    uploader = Uploader(run_dir, target, process)
    uploader.tell(asdict(target))
    return uploader


class Uploader:
    """The driver's handle on the process that uploads. Nothing here raises into training."""

    def __init__(self, run_dir: Path, target: Target, process: subprocess.Popen[bytes]) -> None:
        self._run_dir = run_dir
        self._target = target
        self._process = process

    def tell(self, message: dict[str, Any]) -> None:
        """Send one message to the process; it may be gone."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def finish(self, wait_s: float = 60.0, status: str | None = None) -> str | None:
        """Send what is left and end the process.

        Args:
            wait_s: longest wait; a server that does not answer is given up after that.
            status: FINISHED, FAILED or KILLED; as in run.json when not given.

        Returns:
            None when everything arrived, else one line that says what did not, why, and how to send it later.
        """
        self.tell({"finish": wait_s, "status": status})
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            code = self._process.wait(wait_s + 2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return incomplete(self._run_dir, self._target.uri, f"not done after {wait_s:.0f} s")
        if code == 0:
            return None
        with contextlib.suppress(ValueError):
            if problem := State(self._run_dir, self._target).values.get("problem"):
                return incomplete(self._run_dir, self._target.uri, problem)
        return incomplete(self._run_dir, self._target.uri, f"the uploader ended with code {code}, see {LOG_FILE}")
