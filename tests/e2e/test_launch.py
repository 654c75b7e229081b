"""Jobs submitted to a Ray that was started as an operator starts it; other ways to start are in test_sites.py.

Ray asks for a token everywhere. Tests that need a Debian package or root say so where it is missing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests import runs

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ESCAPE = "\x1b"
WORDS = [*runs.SMALL, "dataset=digits_lt"]
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}

pytestmark = [pytest.mark.drill, pytest.mark.xdist_group("ray")]


def ray_ports(count: int) -> list[int]:
    """Return free ports below those that the system hands out, and apart from those of Ray's workers."""
    found: list[int] = []
    for port in range(21000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            break
    return found


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Leave out what is no part of a checkout. A package may be called `runs`, too."""
    own = {"runs", "build", "dist"} & set(names) if Path(folder) == ROOT else set()
    return own | shutil.ignore_patterns(".git", ".venv", ".whl", "__pycache__", ".*_cache", "*.egg-info")(folder, names)


class Site:
    """A Ray head started as an operator starts it, with a token; jobs are submitted from outside.

    Args:
        folder: for its temporary files, tokens and the runs' folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir, self.checkout = folder, folder / "runs", folder / "checkout"
        shutil.copytree(ROOT, self.checkout, ignore=_left_out)  # nobody edits it while it is being packed
        gcs, dashboard, agent, client = ray_ports(4)
        self.url, self.dashboard = f"http://127.0.0.1:{dashboard}", ("127.0.0.1", dashboard)
        token, other = folder / "token", folder / "other"
        token.write_text(secrets.token_hex(32))
        other.write_text(secrets.token_hex(32))
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.with_token = clean | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_JOB_STOP_WAIT_TIME_S": "120",
        }
        self.with_another = self.with_token | {"RAY_AUTH_TOKEN_PATH": str(other)}
        self.without = {key: value for key, value in self.with_token.items() if "AUTH" not in key} | NO_TOKEN
        self.log = (folder / "head.log").open("w")
        options = {
            "node-ip-address": "127.0.0.1",
            "port": gcs,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "temp-dir": folder / "ray",
            "num-cpus": 2,
            "object-store-memory": 100_000_000,
        }
        self.head = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in options.items())],
            env=self.with_token, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.port = gcs

    def wait_until_up(self) -> None:
        def answers() -> bool:
            assert self.head.poll() is None, (self.folder / "head.log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(self.dashboard) == 0 and self.job("list", code=None).returncode == 0

        runs.wait_until(answers, "the job server", 180)

    def close(self) -> None:
        self.head.send_signal(signal.SIGTERM)
        try:
            self.head.wait(60)
        finally:
            if self.head.poll() is None:
                os.killpg(self.head.pid, signal.SIGKILL)
            self.log.close()

    @property
    def gcs_address(self) -> str:
        """Ray takes the machine's own address where it is told 127.0.0.1."""
        return re.search(r"ray start --address='([^']+)'", (self.folder / "head.log").read_text())[1]  # type: ignore[index]

    def job(
        self, command: str, *words: str, code: int | None = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`ray job COMMAND`; it must exit with this code, or with any if that is None."""
        done = subprocess.run(
            ["ray", "job", command, "--address", self.url, *words],
            cwd=self.checkout, env=env or self.with_token, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert code is None or done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def stop(self, job: str, word: str) -> None:
        """Run `ray job stop`; the driver, found by a word of its command, is suspended until that has started."""
        (driver,) = [p for p in psutil.process_iter(["cmdline"]) if word in (p.info["cmdline"] or ())]
        driver.suspend()
        try:
            command = ["ray", "job", "stop", "--address", self.url, job]
            stopping = subprocess.Popen(
                command, env=self.with_token, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert stopping.stdout is not None
            shown = iter(stopping.stdout.readline, "")
            assert any("Waiting for job" in line for line in shown)
        finally:
            driver.resume()
        rest, _ = stopping.communicate(timeout=180)
        assert stopping.returncode == 0 and "was stopped" in rest, rest

    def submit(self, name: str, *words: str, options: tuple[str, ...] = (), code: int = 0) -> str:
        """Submit with the README's command and return its output."""
        done = self.job(
            "submit", *options, "--working-dir", ".", "--",
            "python", "-m", "orchestration", "train", *WORDS, f"run.dir={self.run_dir}", f"run.name={name}", *words,
            code=code,
        )  # fmt: skip
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    # Sockets' paths may have 107 letters.
    folder = Path(f"/tmp/et{secrets.token_hex(3)}")
    folder.mkdir(mode=0o700)
    site = Site(folder)
    try:
        site.wait_until_up()
        yield site
    finally:
        site.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(site):
    """Train an undisturbed run; returns it with the output of its submission."""
    return site.run_dir / "calm", site.submit("calm", options=("--submission-id", "calm"))


def test_a_submitted_job_trains_and_its_log_is_plain_lines(site, undisturbed):
    folder, printed = undisturbed
    assert "Job 'calm' succeeded" in printed
    assert sorted(runs.losses(folder)) == list(range(1, 28))
    log = site.job("logs", "calm").stdout
    for shown in (log, printed):
        text = re.split(r"\t(?:SUCC|INFO) ", shown.partition("Running entrypoint")[2])[0]  # our words between Ray's
        lines = text.splitlines()
        assert ESCAPE not in text and "\r" not in text
        assert any(re.match(r"epoch 3/3  step 27/27 \(100%\)  eta ", line) for line in lines), text
        assert any(line.startswith("ensemble ") for line in lines), text
    made_by = json.loads((folder / "run.json").read_text())
    assert made_by["status"] == "finished"
    assert made_by["command"].startswith("expertail train ")
    assert re.fullmatch(r"gcs://_ray_pkg_[0-9a-f]+\.zip", made_by["commit"])  # a digest of what was uploaded


def test_a_refused_command_fails_the_job_and_the_submission(site):
    printed = site.submit("typo", "metod=ride", options=("--submission-id", "typo"), code=1)
    assert "metod: unknown key" in printed
    assert "Job 'typo' failed" in printed
    assert "exit code 1" in printed
    assert not (site.run_dir / "typo").exists()


def test_a_relative_run_folder_is_refused_in_a_job(site):
    printed = site.submit("lost", "run.dir=runs", options=("--submission-id", "lost"), code=1)
    assert "run.dir = runs: relative, and a submitted job starts in a copy of the working directory" in printed
    assert "set run.dir=/..." in printed


def test_a_stopped_job_goes_on_with_the_same_command_to_the_same_end(site, undisturbed):
    folder = site.run_dir / "stopped"
    tracked = ("tracking.enabled=true", f"tracking.uri=sqlite:///{site.folder}/mlflow.db")
    site.submit("stopped", *tracked, options=("--no-wait", "--submission-id", "first"))
    runs.wait_for_step(folder, 6, limit_s=300)
    site.stop("first", "run.name=stopped")
    log = site.job("logs", "first").stdout
    assert "SIGTERM: stopping once a checkpoint is written" in log
    assert "the same command continues from there" in log
    assert "the uploader ended with code" not in log  # the signal reached it too; it went on as long as it was given
    reached = max(runs.steps(folder))
    assert 6 <= reached < 27
    assert (folder / "checkpoints" / f"00-train-{reached:08d}" / "manifest.json").is_file()
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"

    site.submit("stopped", *tracked, options=("--submission-id", "second"))
    calm = undisturbed[0]
    assert runs.losses(folder) == runs.losses(calm)
    assert runs.points(folder) == runs.points(calm)
    assert runs.weights(folder) == runs.weights(calm)
    assert runs.evaluations(folder) == runs.evaluations(calm)


@pytest.mark.parametrize(("who", "status"), [("without", 401), ("with_another", 403)])
def test_nobody_gets_in_without_the_token(site, who, status):
    env = getattr(site, who)
    done = site.job("submit", "--", "true", code=None, env=env)
    assert done.returncode != 0
    assert "Unauthorized" in done.stderr or "Forbidden" in done.stderr
    headers = {} if who == "without" else {"Authorization": f"Bearer {Path(env['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(urllib.request.Request(f"{site.url}/api/jobs/", headers=headers), timeout=20)
    assert refusal.value.code == status
    refusal.value.close()  # it is the answer, with the connection

    words = (*WORDS, f"cluster.address={site.gcs_address}", f"run.dir={site.run_dir}", "run.name=intruder")
    began = time.monotonic()
    driver = subprocess.run(
        [sys.executable, "-m", "orchestration", "train", *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert driver.returncode == 1
    assert "the cluster refuses us: it was started with token authentication" in driver.stderr
    assert {"without": "no token", "with_another": "another token"}[who] in driver.stderr
    assert "Traceback" not in driver.stderr
    assert time.monotonic() - began < 60
    assert not list(site.run_dir.glob("intruder/checkpoints"))
