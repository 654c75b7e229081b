"""Runs with second stages, killed within and between them, end bitwise equal to an undisturbed one.

RIDE with linear heads, then class means (a fit), LWS (steps) and tau-normalisation (a choice), one after the other, all
from RIDE's weights.
"""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from orchestration.runs.checkpoint_writer import CheckpointWriter
from orchestration.runs.stage_run import StageRun
from tests import runs
from tests.second_stages import HOST, second_stages

pytestmark = pytest.mark.ray

STAGES = ["train", "ncm", "lws", "tau"]
COMMON = [
    *HOST,
    "dataset.image_size=8",
    "dataset.augment.crop_padding=1",
    "dataset.val_per_class=5",
    "method.stages.train.batch_size=50",
    "method.stages.train.epochs=1",
    *second_stages(STAGES[1:], epochs=1),
    "method.stages.lws.after=[ncm]",
    "method.stages.tau.after=[lws]",
    "engine.threads=1",
    "run.checkpoint_every_steps=4",
    "tracking.enabled=false",
    "run.pictures=false",
]
PER_EPOCH = 9


class Killed(BaseException):
    """Ends a start as abruptly as a test can inside its own process."""


def die_after(patch, stage, method, step):
    """Let the run die once a method has done its work, at one step of a stage.

    It is a method of its `StageRun`, or of the writer of its checkpoints, which works while the stage goes on.
    """
    owner = StageRun if hasattr(StageRun, method) else CheckpointWriter
    real = getattr(owner, method)

    def dying(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        at = (self.stage, self.step) if owner is StageRun else (self._stage, writing[self._stage])
        if at == (stage, step):
            raise Killed(f"{stage} {method} {step}")
        return found

    patch.setattr(owner, method, dying)


writing: dict[str, int] = {}  # the step of the checkpoint that is being written, by stage


@pytest.fixture(autouse=True)
def note_what_is_written(monkeypatch):
    """Note the step of every checkpoint before its writing begins."""
    start = CheckpointWriter.start

    def noting(self, state):
        writing[self._stage] = state["step"]
        start(self, state)

    monkeypatch.setattr(CheckpointWriter, "start", noting)


@pytest.fixture(scope="module")
def undisturbed(warm_pool, tmp_path_factory):
    from _pytest.monkeypatch import MonkeyPatch

    from tests.conftest import lend

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        assert runs.train(folder, common=COMMON) == 0
    return folder


def same(folder, calm, stages=STAGES):
    assert runs.points_by_stage(folder) == runs.points_by_stage(calm)
    for compared in (lambda f: runs.checkpoints(f, stages), runs.evaluations, runs.exports):
        ours, theirs = compared(folder), compared(calm)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


DEATHS = [
    ("ncm", "_fit", 0),
    ("ncm", "_evaluate", 0),  # its lines are in the journal, its checkpoint is not
    ("ncm", "_save", 0),
    ("lws", "_collect", 4),  # in mid-epoch: workers have written their files, and there is no checkpoint yet
    ("lws", "_complete", 4),
    ("lws", "_collect", PER_EPOCH),
    ("lws", "_name", PER_EPOCH),  # there is one, and its weights are not copied as the best
    ("tau", "_fit", 0),
    ("tau", "_evaluate", 0),
    ("tau", "_keep_best", 0),  # before it is written as the run's result
]


def test_a_run_that_dies_at_every_turn_of_its_second_stages_ends_the_same(undisturbed, warm, tmp_path):
    folder = tmp_path / "run"
    for death in DEATHS:
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, *death)
            with pytest.raises(Killed, match=" ".join(map(str, death))):
                runs.train(folder, common=COMMON)
    assert runs.train(folder, common=COMMON) == 0
    same(folder, undisturbed)


def test_what_an_undisturbed_run_leaves(undisturbed):
    """Otherwise two runs could agree on too little."""
    evaluations = {name: json.loads(text) for name, text in runs.evaluations(undisturbed).items()}
    assert evaluations.keys() == {
        f"evaluation/{below}{name}.json"
        for below in ("", "ncm/", "lws/", "tau/")
        for name in ("last", "best", "measures")
    }
    assert [evaluations[f"evaluation/{s}/last.json"]["step"] for s in STAGES[1:]] == [0, PER_EPOCH, 0]
    (choice,) = evaluations["evaluation/tau/last.json"]["fitted"]["choices"]
    exports = runs.exports(undisturbed)
    model = json.loads(exports["export/tau/last/model.json"])
    assert model["head"] == {"name": "tau_normalised", "gamma": choice["value"]} | {
        "candidates": model["head"]["candidates"]
    }
    assert exports["export/last/model.safetensors"] == exports["export/tau/best/model.safetensors"]
    assert exports["export/ncm/last/model.safetensors"] != exports["export/lws/last/model.safetensors"]


def test_max_steps_that_ends_before_a_stage_without_steps_leaves_it_for_the_next_start(
    undisturbed, warm, tmp_path, capsys
):
    """The first stage's end is the limit; then a step of LWS, which comes after class means."""
    folder = tmp_path / "run"
    for limit, left in ((PER_EPOCH, "ncm, lws, tau"), (PER_EPOCH + 1, "lws, tau")):
        assert runs.train(folder, f"run.max_steps={limit}", common=COMMON) == 0
        said = capsys.readouterr().err
        assert (
            f"run.max_steps = {limit} ended this start before the end of training (still to do: stage {left})" in said
        )
        assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    assert runs.train(folder, common=COMMON) == 0
    extra = [p for p in runs.points_by_stage(folder) if p[:2] == ("lws", 1) and p[2] != "train/loss"]
    assert extra
    assert [p for p in runs.points_by_stage(folder) if p not in extra] == runs.points_by_stage(undisturbed)
    assert runs.exports(folder) == runs.exports(undisturbed)


def test_of_stages_side_by_side_one_that_is_cut_leaves_the_run_unfinished(warm, tmp_path, capsys):
    """Class means come last and need no step; LWS beside them has eight to go."""
    words = [w for w in COMMON if ".after=" not in w and ".tau" not in w and ".ncm" not in w]
    words += [*second_stages(["ncm"]), "cluster.side_by_side=1"]
    folder = tmp_path / "run"
    assert runs.train(folder, f"run.max_steps={PER_EPOCH + 1}", common=words) == 0
    assert "(still to do: stage lws)" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    assert runs.train(folder, common=words) == 0
    assert max(runs.steps(folder, "lws")) == PER_EPOCH
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


# Drills: real processes, and a choice among so many candidates that it takes seconds.

SLOW = [*COMMON, f"method.stages.tau.head.candidates={[k / 1000 for k in range(3000)]}"]
SLOW += ["method.stages.lws.epochs=6"]


@pytest.fixture(scope="module")
def calm(warm_pool, tmp_path_factory):
    from _pytest.monkeypatch import MonkeyPatch

    from tests.conftest import lend

    folder = tmp_path_factory.mktemp("calm") / "run"
    with MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        assert runs.train(folder, common=SLOW) == 0
    return folder


def has_checkpoint(folder, stage):
    return any((folder / "checkpoints").glob(f"{STAGES.index(stage):02d}-{stage}-[0-9]*"))


def workers_of(folder):
    path = folder / "run.json"
    return json.loads(path.read_text()).get("workers", []) if path.exists() else []


def fits(folder, stage):
    """Wait until a stage's workers are announced, and a moment into its fit, which takes about a second."""
    runs.wait_until(lambda: any(w["stage"] == stage for w in workers_of(folder)), f"workers of {stage}")
    time.sleep(0.3)


MOMENTS = {
    "between the first stage and a fit": lambda folder: runs.wait_until(
        lambda: has_checkpoint(folder, "train"), "the first stage's checkpoint"
    ),
    "between a fit and the stage after it": lambda folder: runs.wait_until(
        lambda: has_checkpoint(folder, "ncm"), "the fit's checkpoint"
    ),
    "in the second stage's epoch": lambda folder: runs.wait_for_step(folder, 6, stage="lws"),
    "in a fit": lambda folder: fits(folder, "tau"),
}


@pytest.mark.drill
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_driver_killed_goes_on_bitwise(moment, calm, warm, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(folder, common=SLOW)
    try:
        MOMENTS[moment](folder)
    finally:
        process.kill()
        process.wait()
    assert not has_checkpoint(folder, "tau")
    assert runs.train(folder, common=SLOW) == 0
    same(folder, calm)


@pytest.mark.drill
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed_changes_nothing(moment, calm, warm, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(folder, common=SLOW)
    try:
        MOMENTS[moment](folder)
        assert not has_checkpoint(folder, "tau")
        (victim,) = workers_of(folder)
        os.kill(victim["pid"], signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "a worker died" in output
    # Whichever the death falls into: a stage's training, or what follows on its last checkpoint, as its predictions.
    noted = json.loads((folder / "run.json").read_text())
    assert noted.get("failures", 0) + len(noted.get("losses_after_training", [])) == 1
    same(folder, calm)


@pytest.mark.drill
def test_sigterm_in_a_fit_lets_it_end_and_a_start_after_it_finishes(calm, warm, tmp_path):
    """A fit has no checkpoint to stop at, and is the run's last stage here: it ends, and the run with it."""
    folder = tmp_path / "run"
    process = runs.start(folder, common=SLOW)
    fits(folder, "tau")
    process.terminate()
    output, _ = process.communicate(timeout=300)
    assert "SIGTERM: stopping once a checkpoint is written" in output
    assert has_checkpoint(folder, "tau")
    assert runs.train(folder, common=SLOW) == 0
    same(folder, calm)
