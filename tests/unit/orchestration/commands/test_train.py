"""Training decides what cluster.experts_per_worker=auto stands for, and ends with a true status and exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from types import SimpleNamespace

import pytest

from orchestration.commands import train
from orchestration.config.compose import load_config
from orchestration.preflight import placements
from orchestration.preflight.node_speed import Measured
from orchestration.preflight.placements import ONE_NODE
from orchestration.runs.admission import admit
from orchestration.runs.stopping import Outcome, Stopped
from orchestration.training.mesh import MeshShape
from tests import short_runs

AUTO = ["method=ride", "dataset=digits_lt", "run.dir=/runs", "cluster.experts_per_worker=auto", "cluster.workers=3"]
COMPUTE_S = {MeshShape(3, 3): 1.0, MeshShape(3, 1): 0.5, MeshShape(3, 3, 3): 0.4}
FAST, SLOW = [(1024, 1e-6), (2**22, 1e-4)], [(1024, 1.0), (2**22, 2.0)]


@pytest.fixture
def measuring(monkeypatch):
    """A cluster of one node; returns how often it was measured, and what it measures."""
    links = {ONE_NODE: FAST}
    asked = []
    monkeypatch.setattr(train, "cluster", lambda address: contextlib.nullcontext())
    monkeypatch.setattr(train, "node_resources", lambda: {"a": {"CPU": 3.0}})

    def measure_for(config, nodes):
        asked.append(config)
        return Measured({shape: {"train": s} for shape, s in COMPUTE_S.items()}, dict(links))

    monkeypatch.setattr(placements, "measure_for", measure_for)
    return SimpleNamespace(asked=asked, links=links)


def begun(*words):
    """A run folder whose first start had this config."""
    return SimpleNamespace(started=True, stored_config=lambda: load_config([*AUTO, *words]))


NEW = SimpleNamespace(started=False)


def placed(folder, *words):
    return train._placed(admit(load_config([*AUTO, *words])), folder)


def test_a_first_start_takes_what_is_fastest_and_says_why(measuring, capsys):
    found = placed(NEW)
    assert found.config.cluster.experts_per_worker == found.shape.experts_per_worker == 3
    assert found.placement["experts_per_worker"] == 3 and found.placement["measured"] is True
    assert "cluster.experts_per_worker=auto is 3 for 3 workers: the fastest by measurement" in capsys.readouterr().err
    measuring.links[ONE_NODE] = SLOW
    assert placed(NEW).config.cluster.experts_per_worker == 1


def test_a_resumed_run_keeps_its_number_whatever_a_measurement_would_say(measuring):
    for number in (1, 3):
        found = placed(begun(f"cluster.experts_per_worker={number}"))
        assert found.config.cluster.experts_per_worker == number and not found.placement
    packed = placed(begun("cluster.experts_per_worker=null", "cluster.workers=1"))
    assert packed.shape.replicas == 3, "its one worker had all experts"
    assert not measuring.asked


def test_a_resumed_run_chooses_again_where_its_number_does_not_fit(measuring):
    found = placed(begun("cluster.experts_per_worker=1"), "cluster.workers=2")
    assert found.config.cluster.experts_per_worker == 3
    assert not measuring.asked, "no other number fits"


def test_one_worker_and_a_given_number_need_no_measurement(measuring):
    assert placed(NEW, "cluster.workers=1").config.cluster.experts_per_worker == 3
    given = admit(load_config([*AUTO[:-2], "cluster.workers=3", "cluster.experts_per_worker=1"]))
    assert train._placed(given, NEW) is given
    assert not measuring.asked


def test_without_a_measurement_the_model_decides_and_says_so(measuring, monkeypatch, capsys):
    nothing = Measured(problems=["the link inside a node was not measured: no answer in time"])
    monkeypatch.setattr(placements, "measure_for", lambda config, nodes: nothing)
    found = placed(NEW)
    assert found.placement["measured"] is False
    said = capsys.readouterr().err
    assert "by orders of magnitude, since nothing was measured" in said and "no answer in time" in said
    assert placed(NEW).shape == found.shape


def test_a_signal_while_pictures_are_drawn_ends_a_finished_run_and_the_same_command_draws_them(
    tmp_path, monkeypatch, capsys
):
    """Models, table and status are there before the first picture; SIGTERM comes as it is saved.

    A page that an earlier start drew, cut by run.max_steps, is gone by then, and does not pass for this one.
    """
    path = short_runs.train(tmp_path / "run", "ce", stages=1)
    words = [f"run.dir={tmp_path}", "run.name=run", "run.features_picture=false"]
    config = load_config(["method=ce", *short_runs.WORDS, *words])
    (checkpoint,) = (path / "checkpoints").glob("[0-9]*")
    monkeypatch.setattr(train, "train", lambda *_: Outcome("train", True, 2, checkpoint))
    (path / "report").mkdir(exist_ok=True)
    (path / "report" / "index.html").write_text("drawn when run.max_steps had cut the run")

    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", stop)
        with pytest.raises(Stopped, match="SIGTERM while its report was drawn") as stopped:
            train.train_and_report(config, {})
    assert stopped.value.exit_code == 143
    assert json.loads((path / "run.json").read_text())["status"] == "finished"
    assert (path / "report" / "table.txt").read_text() == capsys.readouterr().out
    assert [file.name for file in (path / "report").iterdir()] == ["table.txt"]

    assert train.train_and_report(config, {}) == 0
    assert {"index.html", "class_counts.png"} <= {file.name for file in (path / "report").iterdir()}
    assert (path / "report" / "table.txt").read_text() == capsys.readouterr().out


def test_a_signal_after_the_last_step_leaves_the_pictures_out(tmp_path, monkeypatch):
    path = short_runs.train(tmp_path / "run", "ce", stages=1)
    config = load_config(["method=ce", *short_runs.WORDS, f"run.dir={tmp_path}", "run.name=run"])
    (checkpoint,) = (path / "checkpoints").glob("[0-9]*")
    monkeypatch.setattr(train, "train", lambda *_: Outcome("train", True, 2, checkpoint, signal=signal.SIGUSR1))
    with pytest.raises(Stopped, match="the same command draws the report"):
        train.train_and_report(config, {})
    assert [file.name for file in (path / "report").iterdir()] == ["table.txt"]


def test_a_folder_whose_mlflow_run_cannot_be_settled_costs_the_upload_and_a_line(tmp_path):
    config = load_config(["method=ce", "dataset=digits_lt", f"run.dir={tmp_path}", "run.name=run"])
    path = tmp_path / "run"
    (path / "tracking.json").mkdir(parents=True)
    said = []
    uploads = train._Tracking(config, SimpleNamespace(path=path, url=None))
    uploads.report = said.append
    uploads.begin()
    (line,) = said
    assert line.startswith("tracking: IsADirectoryError: ") and f"later: expertail sync {path}" in line
    uploads.end("FINISHED", 1.0)
    assert len(said) == 1
