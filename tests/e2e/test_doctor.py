"""The doctor and the plan on a cluster of several nodes, healthy and with one fault at a time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.cluster.placement import pack
from tests.nodes import Nodes, why_no_namespaces

pytestmark = [pytest.mark.drill, pytest.mark.xdist_group("ray")]
needs_networks = pytest.mark.skipif(
    why_no_namespaces() is not None, reason=f"nodes have no networks of their own: {why_no_namespaces()}"
)

ROOT = Path(__file__).parents[2]
WORDS = ["cluster.workers=3", "cluster.cpus_per_worker=1", "tracking.enabled=false"]
PATIENT = "import sys, orchestration.cli; sys.exit(orchestration.cli.main(sys.argv[1:]))"
HASTY = f"import orchestration.preflight.node_checks as checks; checks.START_S = 60; {PATIENT}"
PACK = """
import json, os, ray
from ray.util import placement_group, placement_group_table
from orchestration.cluster.connection import node_resources, start_ray
start_ray(None)
group = placement_group([{"CPU": 1.0}] * 3, strategy="PACK")
assert group.wait(60)
of = placement_group_table(group)["bundles_to_node_id"]
names = {node["NodeID"]: f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}" for node in ray.nodes()}
print(json.dumps([node_resources(), [names[of[i]] for i in range(3)]]))
"""


@pytest.fixture(scope="module")
def nodes():
    """Start a head without CPUs, a node with two and a node with one."""
    with Nodes([2, 1]) as cluster:
        yield cluster


def on_head(nodes, *words, code=PATIENT):
    """Run Python on the head. Returns exit code and output."""
    environment = nodes._environment() | {"RAY_ADDRESS": nodes.ray_address, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        nodes.command("place0", sys.executable, "-c", code, *words),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    return ran.returncode, ran.stdout


def findings(text):
    """Return state and text by check."""
    found = {}
    for block in re.split(r"\n(?=ok |warn |FAIL |ready|not ready)", text):
        state, _, rest = block.partition(" ")
        what, _, words = rest.strip().partition(" ")
        found.setdefault((what, state), []).append(words.strip())
    return found


def test_a_whole_cluster_is_ready(nodes, tmp_path):
    code, text = on_head(nodes, "doctor", *WORDS, f"run.dir={tmp_path}/runs")
    assert code == 0, text
    found = findings(text)
    assert not [key for key in found if key[1] == "FAIL"]
    assert "3 of 3 answered" in found["nodes", "ok"][0]
    assert "the same on all nodes and here" in found["versions", "ok"][0]
    assert "3 nodes read and wrote there" in found["storage", "ok"][0]
    assert "6 connections between 3 nodes" in found["ports", "ok"][0]
    assert "token authentication is on, on 3 nodes" in found["auth", "ok"][0]
    assert "2 workers of 0.8 to 1.5 GiB" in text and "1 worker of 0.8 to 1.5 GiB" in text
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_relative_run_dir_and_too_many_workers_are_failures(nodes):
    code, text = on_head(nodes, "doctor", "cluster.workers=6", "cluster.cpus_per_worker=1", "run.dir=runs")
    assert code == 1
    found = findings(text)
    assert "relative, and the cluster has 3 nodes" in found["run.dir", "FAIL"][0]
    assert "has places for 3" in found["cluster", "FAIL"][0]
    assert "3 of 3 answered" in found["nodes", "ok"][0]


@needs_networks
def test_a_folder_that_a_node_has_for_itself_is_found(nodes, tmp_path):
    """An empty file system lies over the folder on one node, as if its mount were missing."""
    shared = tmp_path / "shared"
    (shared / "data").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (shared / "data" / f"{name}-ubyte").write_bytes(b"looked at by the nodes, not opened")
    words = [*WORDS, "dataset=fashion_mnist_lt", f"dataset.root={shared}/data", f"run.dir={shared}"]
    inside = ["nsenter", "-t", str(nodes.raylet("place2").pid), "-m"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(shared)], check=True)
    try:
        code, text = on_head(nodes, "doctor", *words)
    finally:
        subprocess.run([*inside, "umount", str(shared)], check=True)
    assert code == 1
    found = findings(text)
    (storage,), (data,) = found["storage", "FAIL"], found["data", "FAIL"]
    where = nodes.address("place2")
    assert f"{where}/" in storage and "does not share it (No such file or directory" in storage
    assert data.startswith(f"{where}/") and "found nothing" in data
    assert sorted(path.name for path in shared.iterdir()) == ["data"]


@needs_networks
def test_nodes_that_do_not_reach_each_other_are_found(nodes, tmp_path):
    """The head reaches both, so Ray finds nothing wrong."""
    nodes.separate("place1", "place2")
    try:
        code, text = on_head(nodes, "doctor", *WORDS, f"run.dir={tmp_path}")
    finally:
        nodes.heal()
    assert code == 1
    (ports,) = findings(text)["ports", "FAIL"]
    for a, b in (("place1", "place2"), ("place2", "place1")):
        assert re.search(rf"{nodes.address(a)}/\w+ to {nodes.address(b)}/\w+: ", ports), ports
    assert ports.count(" to ") == 2, "the head reaches both"


def test_workers_are_packed_as_ray_packs_them(nodes):
    code, said = on_head(nodes, code=PACK)
    assert code == 0, said
    resources, placed = json.loads(said.splitlines()[-1])
    placement = pack(3, {"CPU": 1.0}, resources)
    assert [placement.nodes[node] for node in placement.node_of] == placed


def test_a_plan_shows_the_workers_on_the_nodes(nodes):
    code, text = on_head(nodes, "plan", *WORDS)
    assert code == 0
    one, other = (rf"{nodes.address(name)}/\w+" for name in ("place1", "place2"))
    assert re.search(rf"{one}  \(2 CPUs; 2 of 3 workers\)", text)
    assert re.search(rf"{other}  \(1 CPUs; 1 of 3 workers\)", text)


def test_a_probe_measures_the_link_between_two_nodes(nodes, tmp_path):
    words = ["method=ride", "dataset=digits_lt", "dataset.image_size=16", "cluster.experts_per_worker=3"]
    code, text = on_head(nodes, "plan", "--probe", *words, *WORDS, f"run.dir={tmp_path}/runs")
    assert code == 0, text
    assert "measured: an all-reduce of two workers between nodes: " in text
    assert "was not measured" not in text
    rows = [line for line in text.splitlines() if re.match(r"  (packed|spread|3 replicas)", line)]
    assert len(rows) == 3 and not [row for row in rows if "n/a" in row], text
    assert re.search(r"stage train: \S+ s per step were predicted, \S+ times what was measured", text)


def test_a_node_that_does_not_answer_is_named(nodes, tmp_path):
    """Last: Ray may count the node as dead afterwards."""
    raylet = nodes.raylet("place2")
    os.kill(raylet.pid, signal.SIGSTOP)
    try:
        code, text = on_head(nodes, "doctor", *WORDS, f"run.dir={tmp_path}", code=HASTY)
    finally:
        os.kill(raylet.pid, signal.SIGCONT)
    assert code == 1
    found = findings(text)
    assert [words.partition("/")[0] for words in found["nodes", "FAIL"]] == [nodes.address("place2")]
    assert "2 of 3 answered" in found["nodes", "ok"][0]
    assert "2 nodes read and wrote there" in found["storage", "ok"][0]
