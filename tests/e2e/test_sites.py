"""Sites that start Ray for a run: the cluster launcher over ssh and Slurm, with a real MLflow server beside them.

Ray asks for a token everywhere. Tests that need a Debian package or root say so where it is missing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests import runs
from tests.mlflow_server import PostgreSQL, answers, free_port
from tests.sandbox import ADDRESS, HOST, Sandbox, missing

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ESCAPE = "\x1b"
WORDS = [*runs.SMALL, "dataset=digits_lt"]
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}

pytestmark = [pytest.mark.drill, pytest.mark.xdist_group("ray")]


# The cluster launcher


WORKER = "10.77.0.2"


@pytest.fixture
def machines():
    """Make a head, which is also the operator's machine and holds key and token, and a worker that it can log in to."""
    if why := missing("sshd", "ssh", "ssh-keygen", "rsync"):
        pytest.skip(f"{why}; needed root and: apt-get install openssh-server rsync iproute2")
    folder = Path(f"/tmp/et{secrets.token_hex(3)}")
    with (
        Sandbox(folder / "head", BIN.parent) as head,
        Sandbox(folder / "worker", BIN.parent, WORKER, "site-worker", head) as worker,
    ):
        head.run("mkdir -m 700 ~/.ssh ~/.ray; ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519")
        (head.home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        key = (head.home / ".ssh" / "id_ed25519.pub").read_text()
        for machine, address in ((head, ADDRESS), (worker, WORKER)):
            machine.run("mkdir -m 700 -p ~/.ssh /run/sshd; ssh-keygen -q -t ed25519 -N '' -f ~/host_key")
            (machine.home / ".ssh" / "authorized_keys").write_text(key)
            (machine.home / "sshd_config").write_text(
                f"ListenAddress {address}\nHostKey {machine.home}/host_key\nPidFile none\nUsePAM no\n"
                f"PasswordAuthentication no\nStrictModes no\n"
            )
            machine.run("$(command -v sshd || echo /usr/sbin/sshd) -f ~/sshd_config -E ~/sshd.log")
        yield head, worker
    shutil.rmtree(folder, ignore_errors=True)


def test_the_cluster_launcher_starts_nodes_over_ssh_and_submits_to_them(machines, record_property):
    """The shipped files, with the addresses of these machines and their user in place of the site's."""
    machine, worker = machines
    config = yaml.safe_load((ROOT / "deploy" / "cluster-onprem.yaml").read_text())
    config["provider"] |= {"head_ip": ADDRESS, "worker_ips": [WORKER]}
    config["auth"]["ssh_user"] = "root"
    (machine.home / "cluster.yaml").write_text(yaml.safe_dump(config))
    run_dir = machine.folder.parent / "runs"

    def ray(words: str, code: int | None = 0) -> str:
        return machine.run(f"PATH=/opt/expertail/bin:$PATH ray {words}", limit_s=400, code=code, TERM="dumb")

    def submit(*words: str, code: int = 0) -> str:
        launch = ROOT / "deploy" / "launch.py"
        return ray(f"submit cluster.yaml {launch} -- train {' '.join([*WORDS, *words])}", code)

    begun = time.monotonic()
    ray("up -y cluster.yaml")
    wait_for_nodes(machine, 2)
    record_property("seconds until the worker has joined", round(time.monotonic() - begun, 1))
    print(f"seconds until the worker has joined: {time.monotonic() - begun:.1f}")
    token = worker.home / ".ray" / "auth_token"
    assert token.read_text() == (machine.home / ".ray" / "auth_token").read_text()
    assert token.stat().st_mode & 0o777 == 0o600
    words = ("method.stages.train.epochs=1", "method.head.scale=20", "method.stages.train.objective.scale=20")
    words += ("engine.precision=float64",)
    printed = submit(f"run.dir={run_dir}", "run.name=sent", *words)
    ours = printed[printed.index("run folder ") : printed.index("Calibration")]
    assert "epoch 1/1  step 9/9 (100%)" in ours and ESCAPE not in ours  # TERM=dumb, for ssh makes a terminal of all
    stored = yaml.safe_load((run_dir / "sent" / "config.yaml").read_text())
    assert stored["method"]["head"]["scale"] == 20
    assert sorted(runs.losses(run_dir / "sent")) == list(range(1, 10))
    assert len(machine.run("ls -d /tmp/ray/session_2*").split()) == 1  # the head's Ray; no other was started

    submit(f"run.dir={run_dir}", "run.name=spread", "cluster.workers=3", *words)
    made_by = json.loads((run_dir / "spread" / "run.json").read_text())
    assert {found["node"] for found in made_by["workers"]} == {ADDRESS, WORKER}
    assert "failures" not in made_by
    spread, packed = (runs.losses(run_dir / name) for name in ("spread", "sent"))
    assert spread == pytest.approx(packed, rel=1e-6)
    printed = submit(f"run.dir={run_dir}", "metod=ride", code=1)
    assert "metod: unknown key" in printed

    # As on any other cluster, nothing without the token.
    listing = "PATH=/opt/expertail/bin:$PATH ray job list --address http://127.0.0.1:8265"
    refused = machine.run(listing, code=None, **NO_TOKEN)
    assert "Missing authentication token" in refused
    listening = machine.run("ss -Hltn '( sport = :8265 )'")
    assert "127.0.0.1:8265" in listening and "0.0.0.0" not in listening.split()[3]

    ray("down -y cluster.yaml")
    assert "raylet" not in machine.run("ps -eo comm")
    down_at = time.monotonic()  # Ray is told to stop on the head; the others miss it and end by themselves
    runs.wait_until(lambda: "raylet" not in worker.run("ps -eo comm"), "the end of the worker's Ray", 120)
    record_property("seconds until the worker's Ray has ended", round(time.monotonic() - down_at, 1))
    print(f"seconds until the worker's Ray has ended: {time.monotonic() - down_at:.1f}")


def wait_for_nodes(head, count):
    """Wait until Ray has so many nodes; `ray up` returns once the head runs, which then starts the others."""
    status = "PATH=/opt/expertail/bin:$PATH ray status"

    def joined():
        living = head.run(status, code=None, RAY_AUTH_MODE="token").partition("Pending:")[0]
        return sum(map(int, re.findall(r"^ (\d+) local\.cluster\.node", living, re.MULTILINE))) == count

    runs.wait_until(joined, f"{count} nodes", 180)


# Slurm

_SLURM = """
ClusterName=drill
SlurmctldHost={host}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
KillWait=60
NodeName={host} NodeAddr={address} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm():
    if why := missing("munged", "slurmctld", "slurmd", "sbatch"):
        pytest.skip(f"{why}; needed root and: apt-get install slurm-wlm munge iproute2")
    folder = Path(f"/tmp/et{secrets.token_hex(3)}")
    with Sandbox(folder, BIN.parent) as sandbox:
        (folder / "slurm.conf").write_text(_SLURM.format(host=HOST, address=ADDRESS, folder=folder))
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        munge = " ".join(f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed"))
        sandbox.run(
            f"set -e; munged --force --socket={folder}/munge.sock {munge}; slurmctld; slurmd",
            SLURM_CONF=str(folder / "slurm.conf"),
        )
        yield sandbox
    shutil.rmtree(folder, ignore_errors=True)


def test_slurm_trains_stops_with_notice_and_goes_on_from_the_queue(slurm):
    """`scancel --signal=TERM --batch` is what Slurm itself sends five minutes before the time limit."""
    run_dir = slurm.folder / "runs"
    settings = {"SLURM_CONF": str(slurm.folder / "slurm.conf")}

    def sbatch(name: str, *words: str, code: int | None = 0, options: str = "--wait") -> str:
        return slurm.run(
            f"sbatch {options} --cpus-per-task=2 --time=30 --output={name}.log {ROOT}/deploy/slurm.sbatch "
            f"{' '.join([*WORDS, f'run.dir={run_dir}', f'run.name={name}', *words])}",
            limit_s=600, code=code, **settings,
        )  # fmt: skip

    sbatch("calm")
    log = (slurm.home / "calm.log").read_text()
    ours = log.split("=======================")[2]  # before and after it, Ray starts and stops
    assert "ensemble" in ours and ESCAPE not in ours
    assert sorted(runs.losses(run_dir / "calm")) == list(range(1, 28))
    sbatch("typo", "metod=ride", code=1)
    assert "metod: unknown key" in (slurm.home / "typo.log").read_text()

    job = re.search(r"\d+", sbatch("cut", options=""))[0]  # type: ignore[index]
    runs.wait_for_step(run_dir / "cut", 6, limit_s=400)
    slurm.run(f"scancel --signal=TERM --batch {job}", **settings)
    runs.wait_until(lambda: "back in the queue" in (slurm.home / "cut.log").read_text(), "the queue", 300)
    stopped_at = max(runs.steps(run_dir / "cut"))
    assert 6 <= stopped_at < 27
    assert (run_dir / "cut" / "checkpoints" / f"00-train-{stopped_at:08d}").is_dir()
    # Slurm lets a job that went back wait for two minutes; this one need not.
    slurm.run(f"sleep 5; scontrol update JobId={job} StartTime=now; scontrol release {job}", code=None, **settings)
    state = lambda: slurm.run(f"scontrol show job {job}", code=None, **settings)  # noqa: E731
    runs.wait_until(lambda: "JobState=COMPLETED" in state(), "the end of the job", 600)
    assert runs.losses(run_dir / "cut") == runs.losses(run_dir / "calm")
    assert runs.weights(run_dir / "cut") == runs.weights(run_dir / "calm")


# The tracking server


@pytest.fixture
def tracking_server(tmp_path):
    """Run the container's command from compose.yaml on this machine, with a new database."""
    database = PostgreSQL()
    server = None
    try:
        database.create("mlflow")
        port = free_port()
        for name in ("db_password", "admin_password", "flask_secret"):
            (tmp_path / name).write_text(secrets.token_hex(32) + "\n")
        settings = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "SECRETS": str(tmp_path),
            "DB_HOST": "127.0.0.1",
            "DB_PORT": str(database.port),
            "DB_USER": database.user,
            "PORT": str(port),
            "WORKERS": "1",
            "ARTIFACTS": str(tmp_path / "artifacts"),
            "ALLOWED_HOSTS": f"127.0.0.1:{port}",
        }
        with open(tmp_path / "log", "wb") as log:
            server = subprocess.Popen(
                ["sh", str(ROOT / "deploy" / "mlflow-server.sh")],
                env=settings, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

        def up() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()
            return answers(port)

        runs.wait_until(up, "the MLflow server", 240)
        yield f"http://127.0.0.1:{port}", tmp_path
    finally:
        if server is not None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        database.remove()


def test_the_mlflow_server_keeps_runs_and_artefacts_behind_a_password(tracking_server):
    pytest.importorskip("flask_wtf", reason="needs Flask-WTF, which mlflow[auth] brings")
    uri, folder = tracking_server
    password = (folder / "admin_password").read_text().strip()

    def ask(
        method: str, path: str, body: bytes | None = None, *, secret: str | None = password, **headers: str
    ) -> bytes:
        request = urllib.request.Request(f"{uri}/api/2.0/{path}", body, headers, method=method)
        if secret is not None:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"admin:{secret}".encode()).decode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def refused(*words: object, **more: str | None) -> int:
        with pytest.raises(urllib.error.HTTPError) as refusal:
            ask(*words, **more)  # type: ignore[arg-type]
        refusal.value.close()  # it is the answer, with the connection
        return refusal.value.code

    create = json.dumps({"name": "ours"}).encode()
    json_body = {"Content-Type": "application/json"}
    for secret in (None, "password1234", "wrong"):
        assert refused("POST", "mlflow/experiments/create", create, secret=secret, **json_body) == 401
    assert refused("POST", "mlflow/experiments/create", create, Host="elsewhere.example", **json_body) == 403
    experiment = json.loads(ask("POST", "mlflow/experiments/create", create, **json_body))["experiment_id"]
    begin = json.dumps({"experiment_id": experiment}).encode()
    run = json.loads(ask("POST", "mlflow/runs/create", begin, **json_body))["run"]["info"]
    assert run["artifact_uri"].startswith("mlflow-artifacts:/")
    place = f"mlflow-artifacts/artifacts/{experiment}/{run['run_id']}/artifacts/table.txt"
    ask("PUT", place, b"all 82.9")
    assert ask("GET", place) == b"all 82.9"
    assert refused("GET", place, secret=None) == 401
    written = {path.name for path in folder.iterdir()} - {"db_password", "admin_password", "flask_secret"}
    assert written == {"log", "artifacts"}  # the container has no other place where it may write
    (kept,) = (folder / "artifacts").rglob("table.txt")
    assert kept.read_bytes() == b"all 82.9"
    secret_words = [(folder / name).read_text().strip() for name in ("db_password", "admin_password", "flask_secret")]
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    shown = (folder / "log").read_text() + commands
    assert not [word for word in secret_words if word in shown]
