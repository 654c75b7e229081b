"""Runs are given to lanes, which may die; study.json says what became of each. The lanes here only pretend."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from orchestration.studies.lanes import Lanes
from orchestration.studies.points import Point
from orchestration.studies.side_by_side import SideBySide, room
from orchestration.studies.study_folder import StudyFolder

PRETENDED = """
import json, os, signal, sys, time
from pathlib import Path
out = int(sys.argv[1])
def say(event, **values):
    os.write(out, json.dumps({"event": event, **values}).encode() + b"\\n")
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
say("ready")
for line in sys.stdin:
    job = json.loads(line)
    if "run" not in job:
        continue
    say("began", run=job["run"])
    tries = Path(job["folder"] + ".tries")
    tries.write_text((tries.read_text() if tries.exists() else "") + "x")
    name, status, problem = job["run"], "finished", None
    if name.startswith("dies") or (name.startswith("once") and tries.read_text() == "x"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("nan"):
        status, problem = "failed", "the loss is not finite"
    while name.startswith("long") and not stopped:
        time.sleep(0.01)
    if "slow" in name:
        time.sleep(0.3)
    if stopped:
        status, problem = "stopped", "stopped by SIGTERM"
    say("ended", run=name, status=status, problem=problem, exit=0, memory_mib=1.0)
"""
CPU = ((("CPU", 1.0),), 1)


def study(tmp_path, *runs, cpus=2.0, most=None):
    """Return what trains a study of these runs on a node with so many CPUs, and the lines that it says.

    A run's name is its method, or method-seed.
    """
    parts = {run: run.partition("-") for run in runs}
    points = [
        Point(run, {"method": method}, int(seed or 0), (), run, {"train": run}, need=CPU)
        for run, (method, _, seed) in parts.items()
    ]
    folder = StudyFolder(tmp_path)
    new = {"status": "waiting", "problem": None, "attempts": 0}
    folder.content = {"points": [point.record() | new for point in points]}
    lanes, said = Lanes([sys.executable, "-c", PRETENDED], tmp_path, {}), []
    return SideBySide(folder, points, lanes, lambda: {"a": {"CPU": cpus}}, most, (), said.append), folder, said


def states(folder):
    return {record["run"]: record["status"] for record in folder.records}


def test_a_lane_that_dies_is_replaced_and_costs_its_run_alone(tmp_path):
    training, folder, said = study(tmp_path, "a", "once", "nan", "dies", "b")
    assert training.carry_out() is None
    assert states(folder) == {"a": "finished", "once": "finished", "nan": "failed", "dies": "failed", "b": "finished"}
    assert folder.record("nan")["problem"] == "the loss is not finite" and folder.record("once")["attempts"] == 2
    assert "SIGKILL, again and again without a new checkpoint" in folder.record("dies")["problem"]
    assert (tmp_path / "dies.tries").read_text() == "x" * 6
    assert "once: its process ended by SIGKILL; it goes on from its newest checkpoint" in said
    assert StudyFolder(tmp_path).records == folder.records, "study.json has it all"


def test_the_longest_goes_first_once_an_earlier_seed_has_shown_how_long_it_takes(tmp_path):
    training, _, said = study(tmp_path, "a-0", "slow-0", "b-0", "a-1", "slow-1", "b-1", cpus=1.0)
    assert training.carry_out() is None
    assert [line.split(":")[0] for line in said if "began" in line][:4] == ["a-0", "slow-0", "b-0", "slow-1"]


def test_a_signal_stops_every_run_once_and_the_rest_does_not_begin(tmp_path):
    training, folder, said = study(tmp_path, "long1", "long2", "c")

    def stop_when_both_train():
        while sum("began" in line for line in said) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_both_train, daemon=True).start()
    assert training.carry_out() == signal.SIGTERM
    assert set(states(folder).values()) == {"stopped", "waiting"} and states(folder)["c"] == "waiting"


def test_lanes_that_do_not_start_end_the_study(tmp_path):
    training, _, _ = study(tmp_path, "a")
    training._lanes = Lanes([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, {})
    with pytest.raises(
        ValueError, match=r"3 processes for runs ended with code 3 before they were ready; see .*lanes\.log"
    ):
        training.carry_out()


@pytest.mark.parametrize(
    ("nodes", "need", "runs"),
    [
        ([4, 2], ({"CPU": 1.0}, 1), 6),
        ([4, 2], ({"CPU": 1.0}, 3), 2),
        ([0.5], ({"CPU": 1.0}, 1), 1),
        ([2], ({"CPU": 0.25}, 1), 8),
    ],
)
def test_as_many_runs_as_there_are_places_train_at_once(nodes, need, runs):
    point = Point("a", {}, 0, (), "a", {}, need=(tuple(need[0].items()), need[1]))
    assert room({str(k): {"CPU": cpus} for k, cpus in enumerate(nodes)}, [point]) == runs
