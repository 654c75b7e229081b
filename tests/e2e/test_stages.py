"""Recipes of several stages: parallel or in sequence, disturbed within and between stages, they end the same.

LFME's three experts train side by side on workers of their own, then its student; ride_h2t trains RIDE, then its heads.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from tests import runs

pytestmark = pytest.mark.ray

COMMON = [
    "dataset=digits_lt",
    "dataset.image_size=8",
    "engine.threads=1",
    "run.checkpoint_every_steps=4",
    "run.log_interval_s=0.5",
    "tracking.enabled=false",
    "cluster.cpus_per_worker=0.5",  # four places on two cores
]
EXPERTS = ["many", "medium", "few"]
LFME = [*EXPERTS, "student"]


def lfme(experts, student):
    """Return the overrides for a run of LFME with so many epochs."""
    epochs = dict.fromkeys(EXPERTS, experts) | {"student": student}
    return [*COMMON, "method=lfme", *(f"method.stages.{stage}.epochs={n}" for stage, n in epochs.items())]


@pytest.fixture
def short(warm, tmp_path):
    """Train LFME with its experts in parallel."""
    folder = tmp_path / "short" / "run"
    assert runs.train(folder, common=lfme(2, 1)) == 0
    return folder


def undisturbed(warm_pool, tmp_path_factory, name, words):
    from _pytest.monkeypatch import MonkeyPatch

    from tests.conftest import lend

    folder = tmp_path_factory.mktemp(name) / "run"  # a run writes its name into its files
    with MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        assert runs.train(folder, common=words) == 0
    return folder


def same(folder, calm, stages):
    assert runs.points_by_stage(folder) == runs.points_by_stage(calm)
    ours, theirs = runs.checkpoints(folder, stages), runs.checkpoints(calm, stages)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert runs.evaluations(folder) == runs.evaluations(calm)


def test_experts_that_train_side_by_side_or_one_by_one_are_bitwise_equal(short, warm, tmp_path):
    """Every byte of every stage's checkpoints, the student's included."""
    folder = tmp_path / "one by one" / "run"
    assert runs.train(folder, "cluster.side_by_side=1", common=lfme(2, 1)) == 0
    noted = [r["stage"] for r in runs.records(folder)]
    assert sorted(noted, key=LFME.index) == noted
    same(folder, short, LFME)


def test_a_stage_that_fails_for_good_ends_the_run_and_leaves_checkpoints_of_the_others(warm, tmp_path, capsys):
    """`few` diverges in its third epoch; `many` and `medium` have hours to go."""
    folder = tmp_path / "run"
    late = "method.stages.few.lr_schedule={name: steps, warmup_epochs: 0, milestones: [{after_epoch: 2, factor: 1e35}]}"
    assert runs.train(folder, late, common=lfme(2000, 1)) == 1
    told = capsys.readouterr().err
    assert "expertail: stage few, epoch 3, step " in told
    assert "needed finite numbers" in told
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    for i, stage in enumerate(("many", "medium")):
        newest = sorted((folder / "checkpoints").glob(f"{i:02d}-{stage}-[0-9]*"))[-1]
        assert json.loads((newest / "state.json").read_text())["step"] == max(runs.steps(folder, stage))
        assert f"stage {stage} stopped after step {int(newest.name[-8:])}" in told


# Drills with LFME: runs of half a minute, so that there is a middle to disturb.


LONG = lfme(12, 4)


@pytest.fixture(scope="module")
def calm_lfme(warm_pool, tmp_path_factory):
    return undisturbed(warm_pool, tmp_path_factory, "lfme", LONG)


def every_expert_begun(folder):
    return all(max(runs.steps(folder, stage), default=0) >= 2 for stage in EXPERTS)


def has_checkpoint(folder, stage):
    return any((folder / "checkpoints").glob(f"[0-9][0-9]-{stage}-[0-9]*"))


@pytest.mark.drill
def test_sigterm_leaves_checkpoints_of_all_stages_and_going_on_changes_nothing(calm_lfme, warm, tmp_path, capsys):
    folder = tmp_path / "run"

    def stop():
        runs.wait_until(lambda: every_expert_begun(folder), "a step of every expert")
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert runs.train(folder, common=LONG) == 128 + signal.SIGTERM
    stopper.join()
    assert "the same command continues" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    for i, stage in enumerate(EXPERTS):
        newest = sorted((folder / "checkpoints").glob(f"{i:02d}-{stage}-[0-9]*"))[-1]
        assert json.loads((newest / "state.json").read_text())["step"] == max(runs.steps(folder, stage))
    assert not has_checkpoint(folder, "student")
    assert runs.train(folder, common=LONG) == 0
    same(folder, calm_lfme, LFME)


@pytest.mark.drill
def test_a_driver_killed_while_experts_train_side_by_side_goes_on_bitwise(calm_lfme, warm, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(folder, common=LONG)
    try:
        runs.wait_until(lambda: every_expert_begun(folder), "a step of every expert")
    finally:
        process.kill()
        process.wait()
    assert not has_checkpoint(folder, "student")
    assert runs.train(folder, common=LONG) == 0
    same(folder, calm_lfme, LFME)


@pytest.mark.drill
def test_a_driver_killed_while_the_student_learns_goes_on_bitwise(calm_lfme, warm, tmp_path):
    """Values that the student's objective measured before its first step are restored from its checkpoint."""
    folder = tmp_path / "run"
    process = runs.start(folder, common=LONG)
    try:
        runs.wait_until(lambda: has_checkpoint(folder, "student"), "a checkpoint of the student")
    finally:
        process.kill()
        process.wait()
    assert max(runs.steps(folder, "student"), default=0) < max(runs.steps(calm_lfme, "student"))
    assert runs.train(folder, common=LONG) == 0
    same(folder, calm_lfme, LFME)


@pytest.mark.drill
def test_max_steps_inside_the_students_epoch_teaches_it_nothing(calm_lfme, warm, tmp_path):
    """The evaluation at the stop uses the validation split; it must not change the student's pace."""
    folder = tmp_path / "run"
    before = sum(max(runs.steps(calm_lfme, stage)) for stage in EXPERTS)
    per_epoch = max(runs.steps(calm_lfme, "student")) // 4
    assert runs.train(folder, f"run.max_steps={before + per_epoch + 2}", common=LONG) == 0
    assert max(runs.steps(folder, "student")) == per_epoch + 2
    assert runs.train(folder, common=LONG) == 0
    ours, theirs = runs.checkpoints(folder, LFME), runs.checkpoints(calm_lfme, LFME)
    assert [name for name in theirs if ours[name] != theirs[name]] == []


@pytest.mark.drill
def test_a_worker_of_one_expert_that_dies_stops_nobody_else(warm, tmp_path):
    """The others' steps go on while its new workers load libraries; in the end all equal an undisturbed run."""
    words = lfme(60, 1)
    calm, folder = tmp_path / "calm" / "run", tmp_path / "run"
    assert runs.train(calm, common=words) == 0
    process = runs.start(folder, common=words)
    runs.wait_until(lambda: every_expert_begun(folder), "a step of every expert")
    victims = workers_of(folder)
    killed_at = time.time()
    os.kill(victims["many"], signal.SIGKILL)
    runs.wait_until(lambda: workers_of(folder)["many"] != victims["many"], "new workers")
    now = workers_of(folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert {stage: pid for stage, pid in now.items() if stage != "many"} == {
        stage: victims[stage] for stage in now if stage != "many"
    }
    assert output.count("starting the workers of stage") == 1
    assert "starting the workers of stage many again (failure 1 of" in output
    losses = [r for r in runs.records(folder) if r["name"] == "train/loss"]
    back_at = min(r["time"] for r in losses if r["stage"] == "many" and r["time"] > killed_at + 1)
    for stage in ("medium", "few"):
        times = [r["time"] for r in losses if r["stage"] == stage and killed_at < r["time"] < back_at]
        assert len(times) > 10
        pauses = [b - a for a, b in zip([killed_at, *times], times, strict=False)]
        assert max(pauses) < (back_at - killed_at) / 2, (stage, max(pauses), back_at - killed_at)
    same(folder, calm, LFME)


def workers_of(folder):
    """Return the worker's process by stage."""
    return {host["stage"]: host["pid"] for host in json.loads((folder / "run.json").read_text())["workers"]}


# Drills with H2T: its second stage begins with the weights of its first and trains the heads alone.

H2T = [
    *COMMON,
    "method=ride_h2t",
    "method.stages.train.batch_size=50",
    "method.stages.train.epochs=6",
    "method.stages.train.lr_schedule.milestones=[]",
    "method.stages.h2t.batch_size=50",
    "method.stages.h2t.epochs=6",
]
TWO = ["train", "h2t"]
MOMENTS = {
    "in the first stage": lambda folder: max(runs.steps(folder, "train"), default=0) >= 6,
    "between the stages": lambda folder: (folder / "checkpoints" / "00-train-00000054").is_dir(),
    "in the second stage": lambda folder: max(runs.steps(folder, "h2t"), default=0) >= 6,
}


@pytest.fixture(scope="module")
def calm_h2t(warm_pool, tmp_path_factory):
    return undisturbed(warm_pool, tmp_path_factory, "h2t", H2T)


@pytest.mark.drill
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_driver_killed_in_either_stage_or_between_goes_on_bitwise(moment, calm_h2t, warm, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(folder, common=H2T)
    try:
        runs.wait_until(lambda: MOMENTS[moment](folder), moment)
    finally:
        process.kill()
        process.wait()
    assert has_checkpoint(folder, "h2t") == (moment == "in the second stage")
    assert runs.train(folder, common=H2T) == 0
    same(folder, calm_h2t, TWO)


@pytest.mark.drill
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed_in_either_stage_or_between_changes_nothing(moment, calm_h2t, warm, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(folder, common=H2T)
    runs.wait_until(lambda: MOMENTS[moment](folder), moment)
    (victim,) = json.loads((folder / "run.json").read_text())["workers"]
    os.kill(victim["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "a worker died" in output
    assert json.loads((folder / "run.json").read_text())["failures"] == 1
    same(folder, calm_h2t, TWO)


@pytest.mark.drill
def test_a_restart_waits_for_a_lost_node_and_goes_on_when_another_comes(tmp_path):
    """Two nodes of one core, a worker on each; one node goes, half a minute later another comes."""
    from ray.cluster_utils import Cluster

    folder = tmp_path / "run"
    words = [w for w in runs.SMALL if "epochs" not in w] + [
        "method.stages.train.epochs=2000",
        "run.evaluate_every_epochs=2000",
        "run.max_steps=200",
    ]
    spread = ["cluster.workers=2", "cluster.experts_per_worker=3", "cluster.cpus_per_worker=1"]
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = nodes.add_node(num_cpus=1)
        process = runs.start(folder, *spread, common=words, address=nodes.address)
        runs.wait_for_step(folder, 12, 180)
        nodes.remove_node(lost)
        time.sleep(30)
        assert process.poll() is None, process.communicate()[0]
        nodes.add_node(num_cpus=1)
        output, _ = process.communicate(timeout=240)
    finally:
        nodes.shutdown()
    assert process.returncode == 0, output
    assert "places for 1" in output
    assert "s for a node" in output
    assert list(runs.losses(folder)) == list(range(1, 201))
