"""Runs that are kept at a URL: none of their files is read from a folder that nodes share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from orchestration.cli import main
from orchestration.storage import url_lock
from tests import runs
from tests.nodes import Nodes

SPREAD = ["cluster.workers=3", "cluster.cpus_per_worker=0.3"]


def train(url, local, *words):
    """Run `expertail train` for the run at `url` in this process."""
    place, _, name = url.rpartition("/")
    return main(["train", *runs.SMALL, f"run.dir={place}", f"run.name={name}", f"run.local_dir={local}", *words])


def same(folder, undisturbed):
    assert runs.points(folder) == runs.points(undisturbed)
    assert runs.weights(folder) == runs.weights(undisturbed)
    assert runs.evaluations(folder) == runs.evaluations(undisturbed)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "limits"),
    [([], [14]), pytest.param(SPREAD, [9, 18], marks=pytest.mark.drill)],
    ids=["packed", "spread"],
)
def test_a_run_goes_on_from_what_is_at_its_url(placement, limits, warm, tmp_path, monkeypatch, capsys):
    """Every start is on a node that shares only the URL with the last; the run is bitwise that of a shared folder."""
    monkeypatch.setattr(url_lock, "_SETTLE_S", 0.1)
    undisturbed, url = tmp_path / "run", f"file://{tmp_path}/bucket/runs/one"
    for limit in limits:  # the same evaluations are made
        assert runs.train(undisturbed, *placement, f"run.max_steps={limit}") == 0
    assert runs.train(undisturbed, *placement) == 0
    for limit in limits:
        assert train(url, tmp_path / f"until {limit}", *placement, f"run.max_steps={limit}") == 0
    assert train(url, tmp_path / "to the end", *placement) == 0
    capsys.readouterr()
    kept = tmp_path / "bucket" / "runs" / "one"
    same(kept, undisturbed)
    assert json.loads((kept / "run.json").read_text())["starts"] == len(limits) + 1
    assert train(url, tmp_path / "until 14", *placement) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.drill
@pytest.mark.parametrize(
    ("method", "stages"),
    [("lfme", ["many", "medium", "few", "student"]), ("ride_h2t", ["train", "h2t"])],
)
def test_teachers_and_first_weights_reach_workers_that_see_no_folder(method, stages, warm, tmp_path):
    """LFME's student learns from earlier stages; the heads of H2T start from a trained ensemble."""
    common = [word for word in runs.SMALL if "stages" not in word]
    words = [*common, f"method={method}", *(f"method.stages.{stage}.epochs=1" for stage in stages)]
    undisturbed = tmp_path / "run"
    assert runs.train(undisturbed, common=words) == 0
    kept = [f"run.dir=file://{tmp_path}/bucket", "run.name=run", f"run.local_dir={tmp_path}/here"]
    assert main(["train", *words, *kept]) == 0
    ours = tmp_path / "bucket" / "run"
    assert runs.points_by_stage(ours) == runs.points_by_stage(undisturbed)
    assert runs.checkpoints(ours, stages) == runs.checkpoints(undisturbed, stages)
    assert runs.evaluations(ours) == runs.evaluations(undisturbed)


@pytest.fixture(scope="module")
def cluster():
    with Nodes([1, 1]) as nodes:
        yield nodes


PAIR = ["method.num_experts=2", "cluster.workers=2", "cluster.cpus_per_worker=1"]


@pytest.fixture(scope="module")
def calm(cluster, tmp_path_factory):
    """Train two experts on two nodes, in a folder."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    assert cluster.train(folder, *PAIR, common=runs.LONG).wait(300) == 0, folder.with_suffix(".log").read_text()
    return folder


class Server:
    """An sftp server in the network of a cluster's head, with a key that may log in there.

    Args:
        cluster: the nodes.
        folder: for keys and logs; stored runs are below `runs`.
        program: sshd.
    """

    def __init__(self, cluster, folder, program):
        self.home, self.runs, port, address = folder / "home", folder / "runs", 2222, cluster.address("place0")
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        key = self.home / ".ssh" / "id_ed25519"
        for path in (key, folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        (folder / "sshd_config").write_text(
            f"ListenAddress {address}\nPort {port}\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
            f"PermitRootLogin yes\nPasswordAuthentication no\nStrictModes no\nSubsystem sftp internal-sftp\n"
            f"AuthorizedKeysFile {key}.pub\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        self.url = f"sftp://root@{address}:{port}{self.runs}"
        self._command = cluster.command("place0", program, "-D", "-e", "-f", str(folder / "sshd_config"))
        self._log = folder / "sshd.log"

    def start(self):
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stderr=log)

    def stop(self):
        """End it and all its connections."""
        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            process.kill()
        self._process.wait()


@pytest.fixture
def server(cluster, tmp_path):
    pytest.importorskip("paramiko", reason="needs paramiko; pip install expertail[sftp]")
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    if os.geteuid() != 0 or not Path(program).exists():
        pytest.skip("no sshd, or no right to start it; needed root and: apt-get install openssh-server")
    server = Server(cluster, tmp_path, program)
    server.start()
    yield server
    server.stop()


def on_server(cluster, server, log, local, **more):
    """Start `expertail train` of the same run, kept on the server."""
    words = [*runs.LONG, *PAIR, f"run.dir={server.url}", "run.name=run", f"run.local_dir={local}"]
    return cluster.on_head(log, "-m", "orchestration", "train", *words, HOME=str(server.home), **more)


def checkpoints_on(server):
    return len(list(server.runs.glob("run/checkpoints/[0-9]*/manifest.json")))


@pytest.mark.drill
@pytest.mark.xdist_group("ray")
def test_a_driver_that_is_lost_with_its_disk_costs_the_steps_since_what_was_put(cluster, calm, server, tmp_path):
    """Two experts on two nodes, kept on a server. Only the driver sees its copy, in a file system that ends with it, so
    a new driver is as good as one on another node: killed, the run goes on from the server, bitwise."""
    local, log = tmp_path / "local", tmp_path / "driver.log"
    local.mkdir()
    driver = on_server(cluster, server, log, local, inside=hidden(local))
    runs.wait_until(lambda: checkpoints_on(server) > 1, "a checkpoint there", 200)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not any(local.iterdir())
    since = time.time()
    driver = on_server(cluster, server, log, local, inside=hidden(local))
    assert driver.wait(300) == 0, log.read_text()
    same(server.runs / "run", calm)
    said = json.loads((server.runs / "run" / "run.json").read_text())
    assert (said["status"], said["starts"]) == ("finished", 2)
    print(f"seconds from the second start to the end: {time.time() - since:.1f}")


@pytest.mark.drill
@pytest.mark.xdist_group("ray")
def test_a_server_that_is_away_for_a_while_has_everything_in_the_end(cluster, calm, server, tmp_path):
    """Its connections are cut; training goes on meanwhile."""
    log = tmp_path / "driver.log"
    driver = on_server(cluster, server, log, tmp_path / "local")
    runs.wait_until(lambda: checkpoints_on(server) > 0, "a checkpoint there", 200)
    server.stop()
    journal = next((tmp_path / "local").glob("*/run/metrics.jsonl")).parent
    before = checkpoints_on(server)
    runs.wait_for_step(journal, 60)
    assert checkpoints_on(server) == before
    server.start()
    assert driver.wait(300) == 0, log.read_text()
    same(server.runs / "run", calm)
    assert "training goes on, and it is tried again" in log.read_text()


def hidden(folder):
    """Return a command prefix that mounts an empty file system over a folder, visible to that command alone."""
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh"]
