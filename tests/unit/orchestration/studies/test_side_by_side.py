"""Runs are given to lanes, which may die; study.json says what became of each. The lanes here only pretend."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time

import pytest

from orchestration.studies import side_by_side
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
    more = {"no_room": True} if name.startswith("full") else {}
    if name.startswith("full"):
        status, problem = "failed", "No space left on device"
    if name == "placeless" and tries.read_text() == "x":
        status, problem, more = "failed", "the cluster has places for 0", {"no_place": True}
    if name == "told" and tries.read_text() == "x":
        stopped.append(1)
    while name.startswith("long") and not stopped:
        time.sleep(0.01)
    if "slow" in name:
        time.sleep(0.3)
    if stopped:
        status, problem = "stopped", "stopped by SIGTERM"
    memory = 5000.0 if name.startswith("fat") else 1.0
    say("ended", run=name, status=status, problem=problem, exit=0, memory_mib=memory, **more)
    if stopped:
        break
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


def carry_out(training):
    """Train the study and wait for its lanes, as the command does after its report."""
    stopped_by = training.carry_out()
    training._lanes.finish(print)
    return stopped_by


def states(folder):
    return {record["run"]: record["status"] for record in folder.records}


def test_a_lane_that_dies_is_replaced_and_costs_its_run_alone(tmp_path):
    training, folder, said = study(tmp_path, "a", "once", "nan", "dies", "b")
    assert carry_out(training) is None
    assert states(folder) == {"a": "finished", "once": "finished", "nan": "failed", "dies": "failed", "b": "finished"}
    assert folder.record("nan")["problem"] == "the loss is not finite" and folder.record("once")["attempts"] == 2
    assert "SIGKILL, again and again without a new checkpoint" in folder.record("dies")["problem"]
    assert (tmp_path / "dies.tries").read_text() == "x" * 6
    assert "once: its process ended by SIGKILL; it goes on from its newest checkpoint" in said
    assert StudyFolder(tmp_path).records == folder.records, "study.json has it all"


def test_the_longest_goes_first_once_an_earlier_seed_has_shown_how_long_it_takes(tmp_path):
    training, _, said = study(tmp_path, "a-0", "slow-0", "b-0", "a-1", "slow-1", "b-1", cpus=1.0)
    assert carry_out(training) is None
    assert [line.split(":")[0] for line in said if "began" in line][:4] == ["a-0", "slow-0", "b-0", "slow-1"]


def test_a_signal_stops_every_run_once_and_the_rest_does_not_begin(tmp_path):
    training, folder, said = study(tmp_path, "long1", "long2", "c")

    def stop_when_both_train():
        while sum("began" in line for line in said) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_both_train, daemon=True).start()
    assert carry_out(training) == signal.SIGTERM
    assert set(states(folder).values()) == {"stopped", "waiting"} and states(folder)["c"] == "waiting"
    assert said[-1].endswith("(2 of 3 ended, 0 running, 1 waiting)")


def test_lanes_that_do_not_start_end_the_study(tmp_path):
    training, _, _ = study(tmp_path, "a")
    training._lanes = Lanes([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, {})
    with pytest.raises(
        ValueError, match=r"3 processes for runs ended with code 3 before they were ready; see .*lanes\.log"
    ):
        carry_out(training)


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


def test_runs_whose_nodes_have_gone_wait_for_others_and_do_not_fail(tmp_path, monkeypatch):
    """The node goes before the first run begins, and comes back; a run that never fitted is tried and refused."""
    monkeypatch.setattr(side_by_side, "_NODES_S", 0.0)
    training, folder, said = study(tmp_path, "a", "placeless", "b", most=1)
    looks = iter([{"x": {"CPU": 2.0}}, {}])
    training._nodes = lambda: next(looks, {"x": {"CPU": 2.0}})
    assert carry_out(training) is None
    assert set(states(folder).values()) == {"finished"} and folder.record("placeless")["attempts"] == 2
    assert said[:2] == ["no node has room for the next runs: they wait for one", "there is room again"]

    (tmp_path / "never").mkdir()
    training, folder, _ = study(tmp_path / "never", "placeless", cpus=0.0)
    assert carry_out(training) is None
    assert folder.record("placeless")["problem"] == "the cluster has places for 0"


def test_a_full_disk_ends_the_study_and_fails_no_run(tmp_path):
    training, folder, _ = study(tmp_path, "a", "full", "b", most=1)
    with pytest.raises(ValueError, match="no run begins any more: No space left on device"):
        carry_out(training)
    assert states(folder) == {"a": "finished", "full": "stopped", "b": "waiting"}


def test_a_study_json_that_cannot_be_written_for_a_while_costs_one_line(tmp_path, monkeypatch, capsys):
    training, folder, _ = study(tmp_path, "a", "nan", "b", most=1)
    write, failures = folder.write, iter(range(4))

    def full():
        if next(failures, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write()

    monkeypatch.setattr(folder, "write", full)
    assert carry_out(training) is None
    assert states(StudyFolder(tmp_path)) == {"a": "finished", "nan": "failed", "b": "finished"}
    assert capsys.readouterr().err.count("not written (No space left on device); runs go on") == 1


def test_a_signal_to_one_lane_costs_no_run_and_a_lane_that_grows_is_replaced(tmp_path):
    training, folder, said = study(tmp_path, "a", "told", "fat", "b", most=1)
    lanes = training._lanes
    assert carry_out(training) is None
    assert set(states(folder).values()) == {"finished"} and folder.record("told")["attempts"] == 2
    assert "told: stopped by SIGTERM; it goes on from its newest checkpoint" in said
    assert lanes._started == 3, "one that was stopped, and one that grew by more than its bound"
