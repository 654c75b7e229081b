"""Studies that processes, nodes, disks and signals disturb: each ends with the report of one that nobody disturbed.

The report is compared as a whole, report.json, without the hours that runs took.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from orchestration.studies.status import status_text
from tests import runs
from tests.e2e.test_full_disk import small_disk  # noqa: F401  (a fixture)
from tests.e2e.test_launch import ray_ports, site  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.xdist_group("ray")]

WORDS = [
    "method=ce,ldam,ride", "seed=0,1", "study.name=night", "dataset=digits_lt", "dataset.image_size=8",
    "method.stages.train.batch_size=135", "method.stages.train.epochs=24", "run.checkpoint_every_steps=6",
    "run.evaluate_every_epochs=8", "method.stages.train.lr_schedule.milestones=[]", "tracking.enabled=false",
    "run.pictures=false",
]  # fmt: skip
ENDED_S = 900  # a busy machine


def start(folder, *words, address=None, log=None):
    """Start `expertail study` as an operator does, on a Ray of its own or on the one at an address."""
    command = [sys.executable, "-m", "orchestration", "study", *WORDS, f"run.dir={folder}", *words]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    with open(log or folder / "study.log", "a") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def records(folder):
    path = folder / "night" / "study.json"
    return {one["run"]: one for one in json.loads(path.read_text())["points"]} if path.exists() else {}


def statuses(folder):
    return [one["status"] for one in records(folder).values()]


def told(folder):
    """Return report.json without hours."""
    report = json.loads((folder / "night" / "report" / "report.json").read_text())
    for table in report["tables"]:
        for row in table["rows"]:
            del row["cost"]["worker_hours"], row["cost"]["gpu_hours"]
    return json.dumps(report, indent=1)


def ended_well(process, folder):
    assert process.wait(timeout=ENDED_S) == 0, (folder / "study.log").read_text()[-3000:]
    assert statuses(folder) == ["finished"] * 6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Train the study in peace; returns its folder."""
    folder = tmp_path_factory.mktemp("calm")
    ended_well(start(folder), folder)
    return folder


def same(folder, undisturbed):
    """Compare the reports as a whole, and all that every run has written, bit for bit."""
    assert told(folder) == told(undisturbed)
    for run in records(undisturbed):
        ours, theirs = folder / "night" / run, undisturbed / "night" / run
        assert runs.points(ours) == runs.points(theirs)
        assert runs.weights(ours) == runs.weights(theirs)
        assert runs.evaluations(ours) == runs.evaluations(theirs)


def lanes_of(process):
    found = []
    for child in psutil.Process(process.pid).children() if process.poll() is None else ():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "orchestration.commands.lane" in child.cmdline():
                found.append(child)
    return found


def workers_of(folder):
    """Return the processes of workers that train now."""
    pids = list[int]()
    for run, record in records(folder).items():
        path = folder / "night" / run / "run.json"
        if record["status"] == "running" and path.exists():
            pids += [worker["pid"] for worker in json.loads(path.read_text()).get("workers", ())]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.parametrize("seed", range(2))
def test_a_study_killed_three_times_at_random_ends_with_the_same_report(seed, undisturbed, tmp_path):
    """Driver, lane and worker, one after the other in the order and at the moments that are drawn."""
    draw, process = random.Random(seed), start(tmp_path)
    for who in draw.sample(("driver", "lane", "worker"), 3):
        victims = {
            "driver": lambda its=process: [psutil.Process(its.pid)],
            "lane": lambda its=process: lanes_of(its),
            "worker": lambda: workers_of(tmp_path),
        }[who]
        runs.wait_until(lambda found=victims: "running" in statuses(tmp_path) and bool(found()), f"a {who}", ENDED_S)
        time.sleep(draw.uniform(0, 3))  # six runs take a quiet machine half a minute, and must not be over
        runs.wait_until(lambda found=victims: bool(found()), f"a {who}", ENDED_S)
        draw.choice(victims()).kill()
        print(f"killed a {who}: {statuses(tmp_path)}")
        if who == "driver":
            process.wait()
            process = start(tmp_path)
    ended_well(process, tmp_path)
    same(tmp_path, undisturbed)


def test_a_signal_in_any_phase_ends_a_study_with_143_and_the_same_command_goes_on(undisturbed, tmp_path):
    """While it is laid out, while lanes start, while runs train, while the report is written."""
    report, began = tmp_path / "night" / "report", time.time()
    checkpoints = (tmp_path / "night").glob
    phases = {
        "laid out": (tmp_path / "study.log").exists,
        "prepared": (tmp_path / "night" / ".lock").exists,
        "starting": lambda: "running" in statuses(tmp_path),
        # One of this start: a signal to the start before may have left some.
        "training": lambda: any(path.stat().st_mtime > began for path in checkpoints("*/checkpoints/00-*")),
        "reporting": lambda: set(statuses(tmp_path)) == {"finished"},
    }
    for phase, reached in phases.items():
        began = time.time()
        process = start(tmp_path)
        runs.wait_until(lambda its=reached, p=process: its() or p.poll() is not None, phase, ENDED_S)
        process.terminate()
        code = process.wait(timeout=ENDED_S)
        assert code in ((143, -signal.SIGTERM) if phase in ("laid out", "prepared") else (143,)), phase
        assert not (report / "report.json").exists(), phase
        assert "Traceback" not in (tmp_path / "study.log").read_text()
        time.sleep(1)
        assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    ended_well(start(tmp_path), tmp_path)
    same(tmp_path, undisturbed)


def test_a_second_driver_is_refused_and_disturbs_nothing(undisturbed, tmp_path):
    process = start(tmp_path)
    runs.wait_until(lambda: "running" in statuses(tmp_path), "a run that trains", ENDED_S)
    second = start(tmp_path, log=tmp_path / "second.log")
    assert second.wait(timeout=ENDED_S) == 1
    assert f"already being carried out by process {process.pid} on " in (tmp_path / "second.log").read_text()
    ended_well(process, tmp_path)
    same(tmp_path, undisturbed)


def test_a_full_disk_stops_a_study_and_fails_none_of_its_runs(undisturbed, small_disk):  # noqa: F811
    place, leave = small_disk
    process = start(place, log=place.parent / "study.log")
    runs.wait_until(lambda: any((place / "night").glob("*/checkpoints/00-*")), "a checkpoint", ENDED_S)
    leave(0)
    assert process.wait(timeout=ENDED_S) == 1
    said = (place.parent / "study.log").read_text()
    assert "no run begins any more" in said and "Traceback" not in said
    assert "failed" not in statuses(place)
    leave(None)
    again = start(place, log=place.parent / "study.log")
    assert again.wait(timeout=ENDED_S) == 0, (place.parent / "study.log").read_text()[-3000:]
    same(place, undisturbed)


@pytest.fixture
def two_nodes():
    """Start a head with room for the driver alone, and a node for two runs."""
    from ray.cluster_utils import Cluster

    (port,) = ray_ports(1)  # Ray leaves a socket open where the usual one is taken
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "dashboard_port": port})
    try:
        nodes.add_node(num_cpus=2)
        yield nodes
    finally:
        nodes.shutdown()


def drain(address, node_id):
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node_id]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run(
        [*command, *why, "--deadline-remaining-seconds", "600"], check=True, capture_output=True, timeout=120
    )


def test_a_study_on_two_nodes_leaves_one_that_is_drained(undisturbed, two_nodes, tmp_path):
    process = start(tmp_path, address=two_nodes.address)
    runs.wait_until(lambda: any((tmp_path / "night").glob("*/checkpoints/00-*")), "a checkpoint", ENDED_S)
    two_nodes.add_node(num_cpus=2)
    running = [run for run, record in records(tmp_path).items() if record["status"] == "running"]
    left = json.loads((tmp_path / "night" / running[0] / "run.json").read_text())["workers"][0]["node_id"]
    drain(two_nodes.address, left)
    ended_well(process, tmp_path)
    same(tmp_path, undisturbed)
    nodes = {
        worker["node_id"]
        for run in records(tmp_path)
        for worker in json.loads((tmp_path / "night" / run / "run.json").read_text())["workers"]
    }
    assert nodes - {left}, "runs went on elsewhere"


def test_a_study_whose_only_node_is_drained_waits_and_goes_on_with_another(undisturbed, two_nodes, tmp_path):
    """No run fails for want of a node, however long there is none; status says what they wait for."""
    process = start(tmp_path, address=two_nodes.address)
    runs.wait_until(lambda: any((tmp_path / "night").glob("*/checkpoints/00-*")), "a checkpoint", ENDED_S)
    running = [run for run, record in records(tmp_path).items() if record["status"] == "running"]
    drain(
        two_nodes.address,
        json.loads((tmp_path / "night" / running[0] / "run.json").read_text())["workers"][0]["node_id"],
    )
    waits = "it waits for a node with room for its runs"
    runs.wait_until(lambda: waits in status_text(tmp_path / "night"), "runs that wait", ENDED_S)
    time.sleep(10)
    assert "carried out by process" in status_text(tmp_path / "night") and process.poll() is None
    assert "failed" not in statuses(tmp_path)
    two_nodes.add_node(num_cpus=2)
    ended_well(process, tmp_path)
    same(tmp_path, undisturbed)


def test_a_submitted_study_that_is_stopped_goes_on_when_it_is_submitted_again(undisturbed, site):  # noqa: F811
    folder, words = site.run_dir, ["python", "-m", "orchestration", "study", *WORDS, f"run.dir={site.run_dir}"]
    site.job("submit", "--no-wait", "--submission-id", "study1", "--working-dir", ".", "--", *words)
    runs.wait_until(lambda: any((folder / "night").glob("*/checkpoints/00-*")), "a checkpoint", ENDED_S)
    site.stop("study1", "study.name=night")
    log = site.job("logs", "study1").stdout
    ours = [line for line in log.splitlines() if line.startswith("expertail: ")]
    assert "expertail: SIGTERM: stopping once a checkpoint is written" in ours
    assert not any("\x1b" in line or "\r" in line for line in ours), "no live line in a job's log"
    assert "running" not in statuses(folder)
    site.job("submit", "--submission-id", "study2", "--working-dir", ".", "--", *words)
    assert statuses(folder) == ["finished"] * 6
    commits = re.compile(r'"(commit|gcs://[^"]*|[0-9a-f]{40}\+?)": ("[^"]*"|6)')
    assert commits.sub("", told(folder)) == commits.sub("", told(undisturbed)), "but for what the commit is called"
