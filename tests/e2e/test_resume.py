"""A run that is killed at any moment and started again ends bitwise equal to an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from tests import runs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def undisturbed(warm_pool, tmp_path_factory):
    """Train the undisturbed run, packed."""
    from _pytest.monkeypatch import MonkeyPatch

    from tests.conftest import lend

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        assert runs.train(folder) == 0
    return folder


def same(folder, undisturbed):
    assert runs.points(folder) == runs.points(undisturbed)
    assert runs.weights(folder) == runs.weights(undisturbed)
    for name in ("last", "best"):
        ours, theirs = ((f / "evaluation" / f"{name}.json").read_text() for f in (folder, undisturbed))
        assert ours == theirs


def test_a_driver_killed_mid_epoch_goes_on_bitwise(undisturbed, warm, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(folder)
    try:
        runs.wait_for_step(folder, 6)
    finally:
        process.kill()
        process.wait()
    assert runs.train(folder) == 0
    same(folder, undisturbed)


def test_stopping_at_max_steps_and_going_on_changes_nothing(undisturbed, warm, tmp_path, capsys):
    """Steps 5 and 14 lie inside epochs: the extra evaluations there must not touch 'best'."""
    folder = tmp_path / "run"
    for limit in (5, 14):
        assert runs.train(folder, f"run.max_steps={limit}") == 0
        assert max(runs.losses(folder)) == limit
        assert "ensemble" in capsys.readouterr().out
    assert runs.train(folder) == 0
    extra = [p for p in runs.points(folder) if p[1] in (5, 14) and p[0].startswith("test/")]
    assert extra
    assert [p for p in runs.points(folder) if p not in extra] == runs.points(undisturbed)
    assert runs.weights(folder) == runs.weights(undisturbed)


def test_a_finished_run_is_told_again_and_not_trained(undisturbed, warm, capsys):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert runs.train(undisturbed) == 0
    printed = capsys.readouterr()
    assert "many" in printed.out
    assert "finished" in printed.err
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_sigterm_leaves_a_checkpoint_at_the_step_it_stopped(warm, tmp_path, undisturbed, capsys):
    folder = tmp_path / "run"

    def stop():
        runs.wait_for_step(folder, 3)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert runs.train(folder) == 128 + signal.SIGTERM
    stopper.join()
    assert "the same command continues" in capsys.readouterr().err
    stopped = max(runs.losses(folder))
    assert stopped < 27
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == stopped
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    assert runs.train(folder) == 0
    same(folder, undisturbed)


def test_a_worker_killed_in_training_costs_the_steps_since_the_checkpoint_and_nothing_else(tmp_path, warm, capsys):
    """SIGKILL for one of two workers: curve, weights and report equal those of an undisturbed run on two."""
    calm, folder = tmp_path / "calm", tmp_path / "run"
    spread = ["cluster.workers=2", "cluster.experts_per_worker=3", "cluster.cpus_per_worker=0.3"]
    assert runs.train(calm, *spread) == 0
    killed_at = 0.0

    def kill():
        nonlocal killed_at
        runs.wait_for_step(folder, 7)
        killed_at = time.time()
        os.kill(json.loads((folder / "run.json").read_text())["workers"][1]["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert runs.train(folder, *spread) == 0
    killer.join()
    assert "a worker died" in capsys.readouterr().err
    found = json.loads((folder / "run.json").read_text())
    assert found["failures"] == 1
    assert found["recoveries"][0]["steps_again"] <= 4
    again = min(r["time"] for r in runs.records(folder) if r["time"] > killed_at + 1)
    assert again - killed_at < 60
    same(folder, calm)


@pytest.mark.drill
def test_another_mesh_loads_the_same_checkpoint(undisturbed, warm, tmp_path):
    """Packed until step 14, then two replicas of all experts; equal up to rounding."""
    import numpy as np

    folder = tmp_path / "run"
    assert runs.train(folder, "run.max_steps=14", "engine.precision=float64") == 0
    assert runs.train(folder, "cluster.workers=2", "cluster.experts_per_worker=3", "engine.precision=float64") == 0
    whole = tmp_path / "whole"
    assert runs.train(whole, "engine.precision=float64") == 0
    ours, theirs = runs.losses(folder), runs.losses(whole)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "engine", ["engine.zero_stage=2", *(pytest.param(e, marks=pytest.mark.drill) for e in ("engine.name=torch",))]
)
def test_resuming_with_two_replicas_is_bitwise(engine, warm, tmp_path):
    """Momentum lies in partitions there: saved whole, loaded into each worker's part."""
    words = ["cluster.workers=2", "cluster.experts_per_worker=3", "method.stages.train.epochs=1", engine]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.train(whole, *words) == 0
    assert runs.train(parts, *words, "run.max_steps=4") == 0
    assert runs.train(parts, *words) == 0
    assert runs.losses(parts) == runs.losses(whole)
    assert runs.weights(parts) == runs.weights(whole)


DRIVER = """
import os, signal, sys
from orchestration.cli import main
from orchestration.runs.checkpoint_writer import CheckpointWriter
moment, step = sys.argv[1], int(sys.argv[2])
real = getattr(CheckpointWriter, moment)
start = CheckpointWriter.start

def noting(writer, state):
    writer.at = state["step"]
    start(writer, state)

def dying(writer, *args):
    found = real(writer, *args)
    if writer.at == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

CheckpointWriter.start = noting
setattr(CheckpointWriter, moment, dying)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("moment", "complete"),
    [
        pytest.param("_collect", False, id="files written and not named", marks=pytest.mark.drill),
        pytest.param("_name", True, id="best weights not copied"),
        pytest.param("_keep_best", True, id="older ones not removed", marks=pytest.mark.drill),
    ],
)
def test_a_driver_killed_while_a_checkpoint_is_written_goes_on_bitwise(moment, complete, undisturbed, warm, tmp_path):
    """Step 9 ends an epoch, whose evaluation is the best so far; the next steps run when the kill comes."""
    import ray

    folder = tmp_path / "run"
    words = ["train", *runs.SMALL, f"run.dir={tmp_path}", "run.name=run"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    killed = subprocess.run(
        [sys.executable, "-c", DRIVER, moment, "9", *words], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (folder / "checkpoints" / "00-train-00000009").exists() == complete
    assert (folder / "checkpoints" / "best-00-train-00000009").exists() == (moment == "_keep_best")
    assert runs.train(folder) == 0
    same(folder, undisturbed)


STAGES = (
    "method.stages.second={epochs: 1, batch_size: 50, optimizer: {lr: 1e-12}, lr_schedule: {name: steps}, "
    "sampler: {name: class_balanced}, objective: {name: ride, scale: 30}}"
)


@pytest.mark.drill
def test_a_second_stage_begins_with_the_weights_of_the_first_and_resumes(warm, tmp_path, capsys):
    words = ["method.stages.train.epochs=1", STAGES]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.train(whole, *words) == 0
    trunks = []
    for limit in (9, 12):  # the first stage's last step, and the third of the second's
        assert runs.train(parts, *words, f"run.max_steps={limit}") == 0
        newest = sorted((parts / "checkpoints").glob("[0-9]*"))[-1]
        trunks.append(load_file(newest / "trunk.safetensors")["trunk.conv1.weight"])
    assert "stage second begins with the weights of 00-train-00000009" in capsys.readouterr().err
    assert runs.train(parts, *words) == 0
    losses = [(r[0], r[1], r[2]) for r in runs.points(whole) if r[0] == "train/loss"]
    assert [p for p in runs.points(parts) if p[0] == "train/loss"] == losses
    assert len(losses) == 18
    torch.testing.assert_close(trunks[0], trunks[1], rtol=0, atol=1e-7, msg="the second stage must not begin anew")
    assert runs.weights(parts).keys() == runs.weights(whole).keys()


WRITER = """
import sys
from pathlib import Path
from orchestration.storage.checkpoint import Checkpoints, write_file
checkpoints = Checkpoints(Path(sys.argv[1]), ["train"])
print("ready", flush=True)
for step in range(1, 100000):
    folder = checkpoints.begin()
    entries = [write_file(folder, n, step.to_bytes(8, "big") * 100_000) for n in ("trunk", "expert0")]
    best = {"step": step, "checkpoint": f"best-{checkpoints.name('train', step)}"} if step % 3 == 0 else None
    state = {"step": step, "best": best}
    final = checkpoints.complete(folder, checkpoints.name("train", step), entries, state)
    if best:
        checkpoints.copy_weights(final, best["checkpoint"])
        again = checkpoints.begin()
        entries = [write_file(again, n, step.to_bytes(8, "big") * 100_000) for n in ("trunk", "expert0")]
        checkpoints.complete(again, checkpoints.name("train", step), entries, state)
    checkpoints.prune("train", final, 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.drill)])
def test_a_kill_while_checkpoints_are_written_always_leaves_a_whole_one(rounds, tmp_path):
    """Kills at moments spread over the writing of some checkpoints; the newest that is there loads.

    Only one is kept, and every third is written twice at its step, which replaces it.
    """
    from orchestration.storage.checkpoint import Checkpoints

    for kill in range(rounds):
        folder = tmp_path / str(kill)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.126 * kill / rounds)
        process.kill()
        process.wait()
        process.stdout.close()
        checkpoints = Checkpoints(folder, ["train"])
        reported: list[str] = []
        begun = any((folder / "checkpoints").glob("[0-9]*")) or any((folder / "checkpoints").glob(".replaced-*"))
        checkpoints.clean()
        newest = checkpoints.newest("train", reported.append)
        assert (newest is not None) == begun
        assert not reported, "a killed writer left a damaged checkpoint under its final name"
        if newest is not None:
            assert (newest.folder / "trunk").read_bytes() == newest.state["step"].to_bytes(8, "big") * 100_000
        assert not list((folder / "checkpoints").glob(".writing-*"))


@pytest.mark.drill
@pytest.mark.parametrize("kill", range(5))
def test_a_driver_killed_at_random_moments_goes_on_bitwise(kill, undisturbed, warm, tmp_path):
    """Moments from a seed: start-up, steps, evaluations, checkpoints; three kills, then the end."""
    folder = tmp_path / "run"
    rng = random.Random(kill)
    for _ in range(3):
        process = runs.start(folder)
        time.sleep(rng.uniform(8, 16))
        process.kill()
        process.wait()
    assert runs.train(folder) == 0
    same(folder, undisturbed)


@pytest.mark.drill
def test_a_clock_that_jumps_changes_nothing(undisturbed, warm, tmp_path, monkeypatch):
    """The driver's clock goes back an hour, then two days ahead, every few readings."""
    folder, read, real = tmp_path / "run", iter(range(10**6)), time.time
    monkeypatch.setattr(time, "time", lambda: real() + (0, -3600, 172_800)[next(read) // 3 % 3])
    assert runs.train(folder) == 0
    monkeypatch.undo()
    same(folder, undisturbed)
    found = json.loads((folder / "run.json").read_text())
    assert min(found["startup_s"].values()) >= 0
    assert 0 < found["cost"]["worker_hours"] < 1
