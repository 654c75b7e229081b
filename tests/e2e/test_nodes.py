"""Experts spread over several nodes, and runs in which nodes, networks and processes fail.

Each drill ends like an undisturbed run: the same curve, weights and evaluations, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import psutil
import pytest

from tests import runs
from tests.nodes import Nodes, why_no_namespaces

drill = [pytest.mark.drill, pytest.mark.xdist_group("ray")]
needs_networks = pytest.mark.skipif(
    why_no_namespaces() is not None, reason=f"nodes have no networks of their own to cut: {why_no_namespaces()}"
)

LIMIT_S = 40
PAIR = [
    "method.num_experts=2",
    "cluster.workers=2",
    "cluster.cpus_per_worker=1",
    f"cluster.heartbeat_timeout_s={LIMIT_S}",
]


@pytest.fixture(scope="module")
def cluster():
    with Nodes([1, 1, 1]) as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster):
    """Repair the cluster for the next test."""
    cluster.restore()
    return cluster


@pytest.fixture(scope="module")
def calm(cluster, tmp_path_factory):
    """Train two experts on two nodes, undisturbed."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    done(cluster.train(folder, *PAIR, common=runs.LONG), folder)
    return folder


def done(driver, folder, limit_s=400):
    """Wait for a driver to end with exit code 0, and return its output."""
    code = driver.wait(limit_s)
    said = folder.with_suffix(".log").read_text()
    assert code == 0, said
    return said


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def same(folder, calm):
    assert runs.points(folder) == runs.points(calm)
    assert runs.weights(folder) == runs.weights(calm)
    assert runs.evaluations(folder) == runs.evaluations(calm)


def begun(nodes, folder, *words):
    """Start two experts on two nodes and wait for the first checkpoint. Returns driver, nodes and workers."""
    driver = nodes.train(folder, *PAIR, *words, common=runs.LONG)
    runs.wait_for_step(folder, 6, 200)
    pids = [worker["pid"] for worker in run_json(folder)["workers"]]
    places = [nodes.node_of(pid) for pid in pids]
    assert len(set(places)) == 2
    return driver, places, pids


def last_failure(folder):
    """Return when the run last found a failure; workers that start too slowly on a busy machine are failures too."""
    return run_json(folder).get("last_failure", {"time": 0.0})["time"]


def noticed(record_property, folder, since):
    """Wait until the run has found a failure; that takes its time limit and some seconds to save stacks."""
    runs.wait_until(lambda: last_failure(folder) > since, "a failure", LIMIT_S + 20)
    record_property("seconds to notice", round(time.time() - since, 1))
    print(f"seconds to notice: {time.time() - since:.1f}")


def note(record_property, folder, since, **more):
    """Record the cost of a drill: seconds from the fault to the next new step, and steps repeated."""
    found = run_json(folder)
    assert all(recovery["steps_again"] <= 4 for recovery in found["recoveries"]), "more than since the checkpoint"
    lost_at = last_failure(folder)
    stepped = min(r["time"] for r in runs.records(folder) if r["time"] > lost_at)
    figures = {
        "seconds to the last failure": lost_at - since,
        "seconds to the next step": stepped - since,
        "steps again": sum(recovery["steps_again"] for recovery in found["recoveries"]),
        "failures": found["failures"],
        **more,
    }
    for name, value in figures.items():
        record_property(name, round(value, 1))
    print(*(f"{name}: {value:.1f}" for name, value in figures.items()), sep="\n")
    return figures


class TestSpread:
    pytestmark = drill
    WORDS = ("engine.precision=float64", "run.max_steps=9", "cluster.heartbeat_timeout_s=120")

    def test_experts_on_three_nodes_train_as_on_one(self, nodes, tmp_path):
        """On three nodes and on one bit for bit; packed into one worker up to rounding."""
        losses, places = {}, {}
        for name, words in {
            "three nodes": ("cluster.workers=3", "cluster.cpus_per_worker=1"),
            "one node": ("cluster.workers=3", "cluster.cpus_per_worker=0.33"),
            "packed": ("cluster.workers=1", "cluster.cpus_per_worker=1"),
        }.items():
            folder = tmp_path / name.replace(" ", "-")
            done(nodes.train(folder, *self.WORDS, *words), folder)
            losses[name] = runs.losses(folder)
            places[name] = {worker["node_id"] for worker in run_json(folder)["workers"]}
        assert {name: len(found) for name, found in places.items()} == {"three nodes": 3, "one node": 1, "packed": 1}
        assert len(losses["packed"]) == 9
        assert losses["three nodes"] == losses["one node"]
        np.testing.assert_allclose(
            list(losses["three nodes"].values()), list(losses["packed"].values()), rtol=0, atol=1e-6
        )


class TestDrills:
    pytestmark = drill

    def test_a_node_whose_raylet_is_killed_is_replaced_by_a_spare(self, nodes, calm, tmp_path, record_property):
        folder = tmp_path / "run"
        driver, places, _ = begun(nodes, folder)
        killed_at = nodes.crash(places[1])
        noticed(record_property, folder, killed_at)
        said = done(driver, folder)
        assert "a worker died" in said
        gone_at = nodes.first(lambda seen: places[1] not in seen["nodes"], killed_at)
        figures = note(record_property, folder, killed_at, **{"seconds until Ray knows": gone_at - killed_at})
        assert f"{nodes.address(places[1])} does not answer" in said
        assert figures["failures"] == 1, "nothing was started on the dead node"
        assert figures["seconds to the next step"] < 120
        same(folder, calm)

    @needs_networks
    def test_a_network_cut_for_five_seconds_costs_five_seconds(self, nodes, calm, tmp_path):
        folder = tmp_path / "run"
        driver, places, _ = begun(nodes, folder)
        cut_at = time.time()
        nodes.unplug(places[1])
        time.sleep(5)
        nodes.heal()
        done(driver, folder)
        assert last_failure(folder) < cut_at
        same(folder, calm)

    @needs_networks
    def test_a_node_cut_off_for_good_is_replaced_by_a_spare(self, nodes, calm, tmp_path, record_property):
        """Its cable is put back once the run has ended: the node must not come back as a second one."""
        folder = tmp_path / "run"
        driver, places, pids = begun(nodes, folder)
        cut_at = time.time()
        nodes.unplug(places[1])
        noticed(record_property, folder, cut_at)
        done(driver, folder, 600)
        gone_at = nodes.first(lambda seen: places[1] not in seen["nodes"], cut_at)
        figures = note(record_property, folder, cut_at, **{"seconds until Ray knows": gone_at - cut_at})
        assert figures["failures"] == 1
        assert figures["seconds to the next step"] < 240
        same(folder, calm)
        nodes.heal()
        runs.wait_until(lambda: not alive(pids[1]), "the end of the worker that was cut off", 120)

    @needs_networks
    def test_workers_that_do_not_reach_each_other_are_found_and_go_on_when_healed(
        self, nodes, calm, tmp_path, record_property
    ):
        """Both nodes still answer the head, so Ray sees nothing."""
        folder = tmp_path / "run"
        driver, places, _ = begun(nodes, folder)
        cut_at = time.time()
        nodes.separate(*places)
        noticed(record_property, folder, cut_at)
        nodes.heal()
        said = done(driver, folder, 600)
        assert "stacks kept in" in said
        last = sorted((folder / "hangs").iterdir())[-2:]
        assert all("torch/distributed" in path.read_text() for path in last), "both wait in an exchange"
        note(record_property, folder, cut_at)
        same(folder, calm)

    @needs_networks
    def test_two_nodes_that_never_reach_each_other_again_are_named_and_the_run_continues_when_healed(
        self, nodes, calm, tmp_path, record_property
    ):
        folder = tmp_path / "run"
        driver, places, _ = begun(nodes, folder, "cluster.placement_timeout_s=2")
        cut_at = time.time()
        nodes.separate(*places)
        assert driver.wait(300) == 1
        record_property("seconds to the end", round(time.time() - cut_at, 1))
        print(f"seconds to the end: {time.time() - cut_at:.1f}")
        said = folder.with_suffix(".log").read_text()
        one, other = map(nodes.address, places)
        assert f"nodes {one} and {other} do not reach each other, though Ray reaches both; waiting up to 20 s" in said
        assert f"nodes {one} and {other} do not reach each other, though Ray reaches both; needed every node" in said
        assert "the same command continues" in said and "Traceback" not in said
        assert run_json(folder)["failures"] == 1
        nodes.heal()
        done(nodes.train(folder, *PAIR, common=runs.LONG), folder)
        same(folder, calm)

    def test_a_stopped_worker_is_found_and_what_its_partner_did_is_kept(self, nodes, calm, tmp_path, record_property):
        folder = tmp_path / "run"
        driver, _, pids = begun(nodes, folder)
        stopped_at = time.time()
        os.kill(pids[1], signal.SIGSTOP)
        noticed(record_property, folder, stopped_at)
        said = done(driver, folder)
        note(record_property, folder, stopped_at)
        assert "no answer from worker 1" in said
        kept = {path.name[-11:-4]: path.read_text() for path in (folder / "hangs").iterdir()}
        assert kept.keys() == {"worker0", "worker1"}
        assert "thread MainThread:" in kept["worker0"]
        assert "no answer" in kept["worker1"]
        assert not alive(pids[1])
        same(folder, calm)

    def test_a_killed_driver_leaves_nothing_and_the_same_command_goes_on(self, nodes, calm, tmp_path, record_property):
        folder = tmp_path / "run"
        driver, _, pids = begun(nodes, folder)
        driver.kill()
        killed_at = time.time()
        nodes.wait(lambda seen: not seen["actors"] and not seen["groups"], "no actor, no placement group", 60)
        runs.wait_until(lambda: not any(map(alive, pids)), "no process of the run", 60)
        record_property("seconds until nothing is left", round(time.time() - killed_at, 1))
        print(f"seconds until nothing is left: {time.time() - killed_at:.1f}")
        assert time.time() - killed_at < 60
        done(nodes.train(folder, *PAIR, common=runs.LONG), folder)
        restart_s = run_json(folder)["startup_s"]["total"]
        record_property("seconds from the second command to its first step", restart_s)
        print(f"seconds from the second command to its first step: {restart_s}")
        same(folder, calm)
