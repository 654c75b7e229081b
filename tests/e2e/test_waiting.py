"""A run waits for places that others hold: it says so, is seen as failed if it gives up, and else trains."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from orchestration.cluster.fleet import Fleet
from orchestration.commands import train
from orchestration.storage.files import read_json
from tests import runs

pytestmark = [pytest.mark.ray, pytest.mark.slow]

reserve = Fleet.reserve  # before a pool of workers replaces it


@pytest.fixture
def taken(warm, monkeypatch):
    """All CPUs, held by another run; fleets reserve places, though their workers come from the pool."""
    group = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert group.wait(60)
    lent = Fleet.close

    def close(fleet):
        lent(fleet)
        if fleet._group is not None:
            remove_placement_group(fleet._group)
            fleet._group = None

    monkeypatch.setattr(Fleet, "reserve", reserve)
    monkeypatch.setattr(Fleet, "close", close)
    yield group
    remove_placement_group(group)


def test_a_run_that_gives_up_is_seen_as_failed_and_the_same_command_waits_and_trains(
    taken, tmp_path, monkeypatch, capsys
):
    """Beside it a run that could never fit: refused at once, whatever the limit."""
    monkeypatch.setattr(train, "_SHORT_WAIT_S", 120.0)  # for an uploader that still loads MLflow
    folder = tmp_path / "run"
    words = [word for word in runs.SMALL if "tracking" not in word]
    limits = ["tracking.final_wait_s=120", "cluster.placement_timeout_s=3"]
    assert runs.train(folder, *limits, common=words) == 1
    assert "free are 0 CPUs" in (said := capsys.readouterr().err) and "after 3 s of waiting" in said
    stored = read_json(folder / "run.json")
    assert stored["status"] == "failed" and "of waiting" in stored["problem"]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FAILED",)]
        (problem,) = database.execute("SELECT value FROM tags WHERE key = 'problem'").fetchone()
    assert problem == stored["problem"]

    monkeypatch.setattr("orchestration.runs.waiting._SAY_FIRST_S", 0.0)
    thousand = ["cluster.cpus_per_worker=1000", "cluster.placement_timeout_s=3600"]
    assert runs.train(tmp_path / "huge", *thousand) == 1
    assert "the cluster has places for 0" in capsys.readouterr().err

    def leave():
        runs.wait_until(lambda: read_json(folder / "run.json")["status"] == "waiting", "the wait")
        remove_placement_group(taken)

    other = threading.Thread(target=leave)
    other.start()
    assert runs.train(folder, "cluster.placement_timeout_s=600", "run.max_steps=1") == 0
    other.join()
    assert "waiting for 1 x (" in capsys.readouterr().err
    stored = read_json(folder / "run.json")
    assert (stored["status"], stored["problem"], stored["waits_for"]) == ("stopped", None, None)
