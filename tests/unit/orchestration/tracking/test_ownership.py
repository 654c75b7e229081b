"""Two folders never write to one MLflow run, and a folder that was moved keeps its own."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest

from orchestration.storage.files import read_json
from orchestration.storage.run_folder import RunFolder
from orchestration.tracking import ownership
from orchestration.tracking.ownership import copied_from, settle_ownership
from orchestration.tracking.process import State, Target, hold_lock

TARGET = Target("sqlite:////runs/mlflow.db", "expertail", "run")


def key(folder):
    return State(folder, TARGET).values["key"]


@pytest.fixture
def uploaded(tmp_path):
    """A run folder that was uploaded where it is."""
    folder = tmp_path / "run"
    folder.mkdir()
    assert settle_ownership(folder) is None
    state = State(folder, TARGET)
    state.values["run_id"] = "r1"
    state.save()
    return folder


def test_a_folder_where_it_was_keeps_its_run_by_any_path_and_after_a_restore(uploaded, tmp_path):
    before = read_json(uploaded / "tracking.json")
    (tmp_path / "link").symlink_to(tmp_path)
    for same in (uploaded, tmp_path / "link" / "run"):
        assert settle_ownership(same) is None
    shutil.copytree(uploaded, tmp_path / "backup")
    shutil.rmtree(uploaded)
    shutil.move(tmp_path / "backup", uploaded)  # with another inode
    assert settle_ownership(uploaded) is None
    assert key(uploaded) == next(store["key"] for store in before.values() if "key" in store)


def test_a_moved_folder_keeps_its_run_and_says_so_once(uploaded, tmp_path):
    before = key(uploaded)
    moved = shutil.move(uploaded, tmp_path / "moved")
    assert f"was moved from {uploaded} on " in settle_ownership(moved)
    assert settle_ownership(moved) is None
    assert key(moved) == before and copied_from(moved) == {}
    uploaded.mkdir()  # another run in its place
    moved = shutil.move(moved, tmp_path / "again")
    assert "it keeps its MLflow run" in settle_ownership(moved)


def test_a_copy_gets_a_run_of_its_own_also_while_the_original_trains(uploaded, tmp_path):
    before = key(uploaded)
    with contextlib.closing(RunFolder(uploaded)):
        copy = shutil.copytree(uploaded, tmp_path / "copy")
        with contextlib.closing(RunFolder(copy)):  # the lock came along, and holds nobody
            assert "was copied from" in (line := settle_ownership(copy))
    assert line.endswith("; this copy gets an MLflow run of its own")
    assert settle_ownership(copy) is None
    assert "r1" not in json.dumps(State(copy, TARGET).values) and key(uploaded) == before
    state = State(copy, TARGET)
    assert state.values["key"] != before
    state.save()
    assert copied_from(copy) == {"expertail.copied_from": str(uploaded), "expertail.copied_from.run": "r1"}
    assert settle_ownership(uploaded) is None and key(copy) == state.values["key"]


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_of_another_host_is_taken_for_a_copy_unless_both_see_one_storage(
    uploaded, tmp_path, shared, monkeypatch
):
    """On one storage, mounted here at another path, the inode is the same; of a copy over the network it is not."""
    place = (shutil.move if shared else shutil.copytree)(uploaded, tmp_path / "elsewhere")
    if not shared:
        shutil.rmtree(uploaded)
    monkeypatch.setattr(ownership.platform, "node", lambda: "other")
    assert ("it keeps its" if shared else "gets an MLflow run of its own") in settle_ownership(place)


def test_a_working_copy_of_a_url_is_the_run_at_the_url_wherever_it_lies(uploaded, tmp_path, monkeypatch):
    settle_ownership(uploaded, "s3://bucket/runs/run")  # copied there from its path
    (state := State(uploaded, TARGET)).save()
    other = shutil.copytree(uploaded, tmp_path / "cache")
    monkeypatch.setattr(ownership.platform, "node", lambda: "other")
    assert settle_ownership(other, "s3://bucket/runs/run") is None
    assert key(other) == state.values["key"]
    assert "this copy gets" in settle_ownership(other, "s3://bucket/runs/copy")


def test_a_folder_of_an_older_version_keeps_its_run(tmp_path):
    state = State(tmp_path, TARGET)
    state.save()
    assert settle_ownership(tmp_path) is None
    assert key(tmp_path) == state.values["key"]


def test_a_folder_that_another_process_settles_is_not_written_to(uploaded, tmp_path, monkeypatch):
    copy = shutil.copytree(uploaded, tmp_path / "copy")
    before = (copy / "tracking.json").read_text()
    monkeypatch.setattr(ownership, "_WAIT_S", 0.0)
    with (
        hold_lock(copy / ".tracking.json.run.lock", wait_s=0.0),
        pytest.raises(ValueError, match=r"copy/tracking\.json: another process has kept it locked for 0 s; wait until"),
    ):
        settle_ownership(copy)
    assert (copy / "tracking.json").read_text() == before
    assert "was copied from" in settle_ownership(copy)
