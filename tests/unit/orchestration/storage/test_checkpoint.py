"""Looking for a checkpoint reads little, loading one reads each byte once, and damage costs one checkpoint."""

from __future__ import annotations

import contextlib

import pytest
import torch

from orchestration.config.compose import load_config
from orchestration.runs.console import Console
from orchestration.runs.run import Run
from orchestration.runs.stage_run import StageRun
from orchestration.runs.stopping import StopSignals
from orchestration.storage import checkpoint as checkpoint_module
from orchestration.storage.checkpoint import Checkpoints, DamagedCheckpoint, inspect, verify, write_tensors
from orchestration.storage.run_folder import RunFolder

TOTAL = 8


def save(checkpoints, step, best=None, last=None):
    writing = checkpoints.begin()
    names = ("trunk", "trunk.momentum", "expert0", "expert0.momentum")
    entries = [write_tensors(writing, name, {f"{name}.weight": torch.full((50,), float(step))}) for name in names]
    state = {"stage": "train", "step": step, "total_steps": TOTAL, "sums": {}, "best": best, "last": last}
    return checkpoints.complete(writing, checkpoints.name("train", step), entries, state)


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints after steps 4 and 8, the end."""
    made = Checkpoints(tmp_path, ["train"])
    for step in (4, TOTAL):
        save(made, step)
    return made


@pytest.fixture
def hashed(monkeypatch):
    """Files of checkpoints that were hashed, in order."""
    found, real = [], checkpoint_module.file_sha256

    def count(path):
        found.append(f"{path.parent.name}/{path.name}")
        return real(path)

    monkeypatch.setattr(checkpoint_module, "file_sha256", count)
    return found


def flip(path):
    """Change one byte in the middle, not the size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def files_of(folder):
    return sorted(f"{folder.name}/{path.name}" for path in folder.iterdir() if path.name != "manifest.json")


def test_looking_hashes_the_state_alone(checkpoints, hashed):
    newest = checkpoints.newest("train", pytest.fail)
    assert newest.state["step"] == TOTAL
    assert hashed == [f"{newest.folder.name}/state.json"]


def test_one_loss_of_a_worker_hashes_each_byte_of_the_newest_checkpoint_once(checkpoints, hashed):
    """The supervisor looks how far the stage came; the stage then chooses what its workers load."""
    checkpoints.newest("train", pytest.fail)
    hashed.clear()
    newest = checkpoints.newest_verified("train", pytest.fail)
    assert sorted(hashed) == files_of(newest.folder)


def test_a_stage_that_is_not_finished_is_not_hashed_to_find_that_out(tmp_path, hashed):
    checkpoints = Checkpoints(tmp_path, ["train"])
    folder = save(checkpoints, 4)
    assert checkpoints.newest_finished("train", pytest.fail) is None
    assert hashed == [f"{folder.name}/state.json"]


def test_a_flipped_byte_is_named_when_loading_and_the_checkpoint_before_it_is_taken(checkpoints):
    newest = checkpoints.newest("train", pytest.fail).folder
    flip(newest / "expert0.momentum.safetensors")
    assert checkpoints.newest("train", pytest.fail).folder == newest, "looking does not read tensors"
    reported = []
    assert checkpoints.newest_verified("train", reported.append).state["step"] == 4
    assert len(reported) == 1
    assert "expert0.momentum.safetensors: sha256" in reported[0]


def test_a_flipped_byte_makes_a_finished_stage_unfinished(checkpoints):
    newest = checkpoints.newest_finished("train", pytest.fail).folder
    flip(newest / "trunk.safetensors")
    assert checkpoints.newest_finished("train", lambda _: None) is None


def test_a_flipped_state_is_found_by_looking(checkpoints):
    newest = checkpoints.newest("train", pytest.fail).folder
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(state.replace('"step": 8', '"step": 7'))
    reported = []
    assert checkpoints.newest("train", reported.append).state["step"] == 4
    assert "state.json: sha256" in reported[0]


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_file_that_is_missing_or_short_is_found_by_looking(damage, checkpoints):
    path = checkpoints.newest("train", pytest.fail).folder / "trunk.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    if damage == "missing":
        path.unlink()
    assert checkpoints.newest("train", lambda _: None).state["step"] == 4
    with pytest.raises(DamagedCheckpoint, match=r"trunk\.safetensors: .*needed \d+"):
        inspect(path.parent)


def test_damage_to_all_is_refused(checkpoints):
    for folder in checkpoints.folder.iterdir():
        flip(folder / "trunk.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint of stage train is whole .*needed one; restore it"):
        checkpoints.newest_verified("train", lambda _: None)


def test_weights_are_verified_without_the_momentum_that_nobody_loads(checkpoints, hashed):
    folder = checkpoints.newest("train", pytest.fail).folder
    flip(folder / "trunk.momentum.safetensors")
    hashed.clear()
    verify(folder, momentum=False)
    assert sorted(hashed) == [name for name in files_of(folder) if "momentum" not in name]
    with pytest.raises(DamagedCheckpoint, match=r"trunk\.momentum"):
        verify(folder)


def test_a_damaged_checkpoint_is_not_copied_as_the_best(checkpoints):
    folder = checkpoints.newest("train", pytest.fail).folder
    flip(folder / "trunk.safetensors")
    with pytest.raises(DamagedCheckpoint, match="changed since it was written"):
        checkpoints.copy_weights(folder, f"best-{folder.name}")


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(checkpoints):
    """Training goes on from step 4 and saves after 6; the newest by name is damaged and must not push that one out."""
    flip(checkpoints.newest("train", pytest.fail).folder / "trunk.safetensors")
    written = save(checkpoints, 6)
    checkpoints.prune("train", written, keep=1)
    assert [folder.name for folder in checkpoints.folder.iterdir()] == [written.name]
    assert checkpoints.newest_verified("train", pytest.fail).folder == written


def test_older_checkpoints_stay_and_best_weights_that_they_name(checkpoints):
    names = [checkpoints.name("train", step) for step in (4, 6, TOTAL)]
    checkpoints.copy_weights(checkpoints.folder / names[0], f"best-{names[0]}")
    checkpoints.copy_weights(checkpoints.folder / names[0], f"best-{names[1]}")
    save(checkpoints, 6, best={"step": 6, "checkpoint": f"best-{names[1]}"})
    checkpoints.prune("train", checkpoints.folder / names[2], keep=2)
    left = {folder.name for folder in checkpoints.folder.glob("*train*")}
    assert left == {names[1], names[2], f"best-{names[1]}"}


class FakeFleet:
    """One worker that remembers what it was told to load."""

    hosts = ({"node": "10.0.0.1"},)
    left_out = ()

    def __init__(self):
        self.calls = []

    def build(self, stage, teachers):
        seen = {
            "class_names": list("0123456789"),
            "counts": [9] * 10,
            "image_shape": [1, 16, 16],
            "has_val": False,
            "remarks": [],
            "files": {},
        }
        return [seen | {"digest": "a" * 64, "steps_per_epoch": 4, "prepares": False}]

    def call(self, name, *args):
        self.calls.append((name, *args))
        return [0.5] if name == "peak_memory_gib" else [None]


def test_a_stage_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, checkpoints, hashed):
    """Its journal is rewound to that step as well, and no worker reads the damaged file."""
    flip(checkpoints.newest("train", pytest.fail).folder / "expert0.safetensors")
    hashed.clear()
    fleet = FakeFleet()
    with contextlib.closing(RunFolder(tmp_path)) as held:
        config = load_config(["method=ce", "dataset.root=/data"])
        run = Run(config, held, Console(stream=None), StopSignals(), {}, lambda: None)
        with run.journal:
            for step in (4, 5, TOTAL):
                run.journal.append("train", 1, step, {"train/loss": 1.0})
            stage = StageRun(run, "train", fleet, run.console)
            stage.prepare()
    assert stage.step == 4
    folder = checkpoints.folder / checkpoints.name("train", 4)
    assert fleet.calls == [("load", str(folder), {"step": 4, "sums": {}, "fitted": {}})]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert len(hashed) == len(set(hashed)), "each file at most once"


def test_a_stage_ends_with_the_checkpoint_that_it_loaded_when_a_newer_one_is_damaged(tmp_path, checkpoints):
    """run.max_steps ends the stage where it resumes, so nothing is written over the damaged one."""
    evaluation = {"step": 4, "evaluation": {"split": "test"}}
    whole = save(checkpoints, 4, last=evaluation)
    flip(checkpoints.newest("train", pytest.fail).folder / "expert0.safetensors")
    with contextlib.closing(RunFolder(tmp_path)) as held:
        words = ["method=ce", "dataset.root=/data", "run.max_steps=4"]
        run = Run(load_config(words), held, Console(stream=None), StopSignals(), {}, lambda: None)
        with run.journal:
            stage = StageRun(run, "train", FakeFleet(), run.console)
            stage.prepare()
            assert stage.carry_out().checkpoint == whole
