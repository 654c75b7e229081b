"""How the driver handles dead workers, full memory and nodes that are taken away, on real workers and nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import runs

pytestmark = [pytest.mark.ray, pytest.mark.drill]

TWO = ["cluster.workers=2", "cluster.experts_per_worker=3", "cluster.cpus_per_worker=0.5"]
# Long enough to be disturbed, and it ends early.
LONG = [w for w in runs.SMALL if "epochs" not in w] + [
    "method.stages.train.epochs=2000",
    "run.evaluate_every_epochs=2000",
]


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def calm(warm_pool, tmp_path_factory):
    """Train 400 undisturbed steps on two workers."""
    from _pytest.monkeypatch import MonkeyPatch

    from tests.conftest import lend

    folder = tmp_path_factory.mktemp("calm") / "run"
    with MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        assert runs.train(folder, *TWO, "run.max_steps=400", common=LONG) == 0
    return folder


def same(folder, calm):
    assert runs.losses(folder) == runs.losses(calm)
    newest = [sorted((f / "checkpoints").glob("[0-9]*"))[-1] for f in (folder, calm)]
    files = [{p.name: p.read_bytes() for p in path.glob("*.safetensors")} for path in newest]
    assert files[0] == files[1]


@pytest.mark.parametrize(("standby", "limit_s"), [(1, 10), (0, 25)])
def test_a_dead_worker_is_replaced_in_time(standby, limit_s, calm, local_ray, tmp_path, record_property):
    """Measured from the kill to the next new step by the journal's clock, and by part."""
    folder = tmp_path / "run"
    process = runs.start(folder, *TWO, "run.max_steps=400", f"cluster.standby={standby}", common=LONG)
    try:
        runs.wait_for_step(folder, 30)
        time.sleep(15 * standby)  # until the spare is warm
        reached = max(runs.losses(folder))
        assert reached < 400, "the run must outlast its spare's start"
        os.kill(run_json(folder)["workers"][1]["pid"], signal.SIGKILL)
        killed_at = time.time()
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    (recovery,) = run_json(folder)["recoveries"]
    again = min(r["time"] for r in runs.records(folder) if r["name"] == "train/loss" and r["time"] > killed_at + 0.5)
    record_property("recovery_s", again - killed_at)
    record_property("breakdown", recovery["seconds"])
    print(f"standby {standby}: {again - killed_at:.1f} s, {recovery}")
    assert "trains again after" in output
    assert recovery["steps_again"] <= 4
    assert again - killed_at < limit_s, recovery
    same(folder, calm)


def test_a_worker_over_its_memory_ends_the_run_with_the_reason(local_ray, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(folder, "cluster.memory_gib_per_worker=0.3")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "cluster.memory_gib_per_worker = 0.3" in output
    assert "out of memory 2 times in a row" in output
    assert "Traceback" not in output
    assert run_json(folder)["failures"] == 1


def test_a_worker_that_the_memory_monitor_ends_is_told_so_and_not_tried_for_ever(tmp_path):
    """Ray ends workers once a node uses more memory than a threshold; here the node already does."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "RAY_memory_monitor_refresh_ms": "100",
        "RAY_memory_usage_threshold": "0.01",
    }
    command = [sys.executable, "-m", "orchestration", "train", *runs.SMALL, f"run.dir={tmp_path}", "run.name=run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "out of memory" in done.stderr
    assert "2 times in a row" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_on_one_host_do_not_collide(tmp_path):
    """Each has its own Ray, in one run.dir; the same overrides under two names give the same weights."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "orchestration", "train", *runs.SMALL, f"run.dir={tmp_path}"]
    both = [subprocess.Popen([*command, f"run.name={name}"], env=environment) for name in ("one", "other")]
    assert [process.wait(300) for process in both] == [0, 0]
    same(tmp_path / "one", tmp_path / "other")


@pytest.fixture
def two_nodes():
    """Start a head with room for the driver alone, and two nodes of two cores."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes.add_node(num_cpus=2, resources={"first": 1})
        yield nodes
    finally:
        nodes.shutdown()


def drain(address, node_id):
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node_id]
    why = [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "600",
    ]
    subprocess.run([*command, *why], check=True, capture_output=True, timeout=60)


def test_a_node_that_is_drained_is_left_after_a_checkpoint(calm, two_nodes, tmp_path):
    """A notice for the workers' node costs no step: they move to the other; the failures stay at none."""
    folder = tmp_path / "run"
    process = runs.start(folder, *TWO, "run.max_steps=400", common=LONG, address=two_nodes.address)
    try:
        runs.wait_for_step(folder, 20)
        two_nodes.add_node(num_cpus=2)
        before = run_json(folder)["workers"][0]
        drain(two_nodes.address, before["node_id"])
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "will be taken away; checkpoint written after step" in output
    found = run_json(folder)
    assert found["preemptions"] == 1
    assert "failures" not in found
    assert found["recoveries"][0]["steps_again"] == 0
    assert found["workers"][0]["node_id"] != before["node_id"]
    same(folder, calm)


def test_a_node_that_several_stages_leave_is_one_preemption(two_nodes, tmp_path):
    """LFME's three experts train side by side on the node that is drained; all move to the other."""
    folder = tmp_path / "run"
    experts = [f"method.stages.{stage}.epochs=2000" for stage in ("many", "medium", "few")]
    words = [w for w in runs.SMALL if "stages.train" not in w] + ["method=lfme", *experts]
    process = runs.start(folder, "cluster.cpus_per_worker=0.5", common=words, address=two_nodes.address)

    def seats():
        return {worker["stage"]: worker["node_id"] for worker in run_json(folder)["workers"]}

    try:
        for stage in ("many", "medium", "few"):
            runs.wait_for_step(folder, 5, stage=stage)
        (before,) = set(seats().values())
        two_nodes.add_node(num_cpus=2)
        drain(two_nodes.address, before)
        runs.wait_until(lambda: len(run_json(folder).get("recoveries", [])) == 3, "three recoveries")
        assert len(seats()) == 3 and before not in seats().values()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.count("(preemption 1 of at most 100)") == 3
    found = run_json(folder)
    assert found["preemptions"] == 1
    assert "failures" not in found


def test_a_drained_cluster_without_another_node_ends_with_status_75_and_goes_on_later(calm, two_nodes, tmp_path):
    folder = tmp_path / "run"
    words = [*TWO, "run.max_steps=400", "cluster.placement_timeout_s=1"]
    process = runs.start(folder, *words, common=LONG, address=two_nodes.address)
    try:
        runs.wait_for_step(folder, 20)
        drain(two_nodes.address, run_json(folder)["workers"][0]["node_id"])
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert "the same command continues from it" in output
    assert run_json(folder)["status"] == "stopped"
    two_nodes.add_node(num_cpus=2)
    again = runs.start(folder, *words, common=LONG, address=two_nodes.address)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    same(folder, calm)


def test_sigterm_for_the_whole_process_group_leaves_a_checkpoint(tmp_path):
    """`timeout`, service managers and batch systems send it so; the run's own Ray must outlive it."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "orchestration", "train", *LONG, f"run.dir={tmp_path}", "run.name=run"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        runs.wait_for_step(tmp_path / "run", 10, 180)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command continues" in output
    newest = sorted((tmp_path / "run" / "checkpoints").glob("[0-9]*"))[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == max(runs.losses(tmp_path / "run"))
