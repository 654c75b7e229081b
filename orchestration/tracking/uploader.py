"""Start and end the process that uploads a run to MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestration.config.paths import import_roots
from orchestration.config.secrets import redact
from orchestration.tracking.headline import FOR_TRAINING, VIEW
from orchestration.tracking.process import State, Target, incomplete_message
from orchestration.tracking.uri import check_uri

LOG_FILE = "tracking.log"
instead: list[Callable[[Path, Target, Callable[[str], None]], Uploader]] = []
"""Other ways to start an upload than by a process of its own; the last counts. See series.py."""


def start_uploader(
    run_dir: str | os.PathLike[str],
    uri: str,
    experiment: str = "expertail",
    run_name: str | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Uploader:
    """Start the process that uploads a run while it trains. Return at once: nothing is imported or connected here.

    Args:
        run_dir: the run folder, with those of `config.yaml`, `run.json` and `data.json` that exist; or a study's.
        uri: of the tracking store; see `tracking_uri`.
        experiment: MLflow experiment; created when missing.
        run_name: name of the MLflow run; by default that of the folder.
        report: takes a line, from a thread, when the upload cannot go on by itself, or its process ends too early.

    Raises:
        ValueError: the URI is not that of a tracking store.
    """
    run_dir = Path(run_dir)
    target = Target(check_uri(uri), experiment, run_name or run_dir.name)
    if instead:
        return instead[-1](run_dir, target, report)
    path = os.pathsep.join(import_roots() + list(filter(None, [os.environ.get("PYTHONPATH")])))
    with contextlib.ExitStack() as on_failure, open(run_dir / LOG_FILE, "ab") as log:
        problems, end = os.pipe()  # beside the log: what the driver is to say at once
        on_failure.callback(os.close, problems)
        with open(end, "wb", buffering=0):
            process = subprocess.Popen(
                # -P: folders in the current directory may have the names of our packages.
                [sys.executable, "-P", "-m", "orchestration.tracking.sender", str(run_dir), str(end)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(end,),
                start_new_session=True,  # Ctrl-C is for the driver; and priorities count within a session
                env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        on_failure.pop_all()  # from here on the thread of `listen` closes it
    # By standard input, not as an argument: every user of the machine sees arguments, and the URI may hold a password.
    uploader = Uploader(run_dir, target, process)
    uploader.send_message(asdict(target))
    uploader.listen(problems, report)
    return uploader


class Uploader:
    """The driver's handle on the uploading process. No error of it reaches training."""

    def __init__(self, run_dir: Path, target: Target, process: subprocess.Popen[bytes]) -> None:
        self._run_dir = run_dir
        self._target = target
        self._process = process
        self._finishing = False

    def listen(self, problems: int, report: Callable[[str], None]) -> None:
        """Report what the process cannot mend by itself, at once, and its end if it comes before it is asked for.

        Args:
            problems: the end of a pipe on which it writes a line for each; closed by its end, however that comes.
            report: takes a line.
        """

        def follow() -> None:
            with open(problems, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if not self._finishing:
                        report(f"{self.incomplete(line.strip())}; training goes on, and so do the attempts")
            code = self._process.wait()
            if not self._finishing:
                report(f"{self.incomplete(self._end(code))}; training goes on")

        threading.Thread(target=follow, name="uploader", daemon=True).start()

    def send_message(self, message: dict[str, Any]) -> None:
        """Send one message to the process, which may have ended."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def finish(self, wait_s: float = 60.0, status: str | None = None) -> str | None:
        """Let the process send the rest, and end it.

        Args:
            wait_s: the longest wait; a server that does not answer is given up after it.
            status: FINISHED, FAILED or KILLED; by default as in run.json.

        Returns:
            None when everything arrived, else one line that says what is missing, why, and how to send it later.
        """
        self._finishing = True
        self.send_message({"finish": wait_s, "status": status})
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

        # The process keeps to the limit itself; the extra time is for its last request.
        try:
            code = self._process.wait(wait_s + 2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return self.incomplete(f"not done after {wait_s:.0f} s")
        if code == 0:
            return None
        with contextlib.suppress(ValueError):
            if problem := State(self._run_dir, self._target).values.get("problem"):
                return self.incomplete(problem)
        return self.incomplete(self._end(code))

    def place(self) -> str | None:
        """Return where the run and its models are in MLflow, as one line without secrets; None if it is not there."""
        values = State(self._run_dir, self._target).values
        if "run_id" not in values:
            return None
        uri = redact(self._target.uri)
        page = f"{uri.rstrip('/')}/#/experiments/{values['experiment_id']}/runs/{values['run_id']}?{FOR_TRAINING}"
        shown = page if uri.startswith("http") else f"run {self._target.run_name}; mlflow ui --backend-store-uri {uri}"
        model = values.get("models", {}).get("best")
        return f"MLflow: {shown}" + (f"; {model}" if model else "")

    def pages(self) -> str | None:
        """Return where the experiment is in MLflow, on its headline numbers, as one line; None if it is not there."""
        values = State(self._run_dir, self._target).values
        if "experiment_id" not in values:
            return None
        uri, name = redact(self._target.uri), self._target.experiment
        page = f"#/experiments/{values['experiment_id']}/runs?viewStateShareKey={VIEW}&{FOR_TRAINING}"
        if uri.startswith("http"):
            return f"MLflow: {uri.rstrip('/')}/{page}"
        return f"MLflow: experiment {name}; mlflow ui --backend-store-uri {uri}, then http://127.0.0.1:5000/{page}"

    def _end(self, code: int) -> str:
        """Say how the process ended, with its last words."""
        with contextlib.suppress(OSError):
            last = (self._run_dir / LOG_FILE).read_text(errors="replace").strip().splitlines()[-1:]
            return f"the uploader ended with code {code}, {redact(last[0])[:200] if last else 'without a word'}"
        return f"the uploader ended with code {code}, see {LOG_FILE}"

    def incomplete(self, problem: str) -> str:
        """Return the line that says what the problem is and what to do."""
        return incomplete_message(self._run_dir, self._target.uri, problem)
