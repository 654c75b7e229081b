"""Nothing after the last step changes how a run ended: pictures, printing and upload cost themselves and one line."""

from __future__ import annotations

import json

import pytest
import ray

from orchestration.cluster.fleet import Fleet
from orchestration.storage.files import read_json
from tests import runs

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORDS = [
    "method=ce", "dataset=digits_lt", "dataset.image_size=8", "engine.name=torch", "engine.threads=1",
    "method.stages.train.epochs=1", "run.features_picture=false",
]  # fmt: skip


def fail(*_, **__):
    raise RuntimeError("put in")


def fail_at_the_end(folders, found, *_, **__):
    list(found)  # workers are asked for them one by one
    fail()


def die_at_first_prediction(monkeypatch):
    """Let the first worker that is asked for predictions die."""
    call, dead = Fleet.call, []

    def call_after_a_death(fleet, method, *args):
        if method == "predict" and not dead:
            dead.append(fleet.workers[0])
            ray.kill(dead[0])
        return call(fleet, method, *args)

    monkeypatch.setattr(Fleet, "call", call_after_a_death)


def test_faults_after_the_last_step_cost_a_line_each(warm, tmp_path, monkeypatch, capsys):
    die_at_first_prediction(monkeypatch)
    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", fail)
    monkeypatch.setattr("orchestration.runs.kept_predictions.write_predictions", fail_at_the_end)
    monkeypatch.setattr("orchestration.tracking.uploader.State", fail)  # of an uploader that ended badly
    monkeypatch.setattr("orchestration.tracking.uploader.Uploader.send_message", lambda *_: None)
    folder = tmp_path / "price $_$ up"
    assert runs.train(folder, common=WORDS) == 0
    printed, said = capsys.readouterr()
    assert read_json(folder / "run.json")["status"] == "finished"
    assert (folder / "report" / "table.txt").read_text() == printed
    pictures = ["curves", "class_counts", "per_class"]
    assert "stage train is trained; asking new workers for its predictions" in said
    assert "failures" not in read_json(folder / "run.json")
    assert [late["stage"] for late in read_json(folder / "run.json")["losses_after_training"]] == ["train"]
    kept, *drawn, sent = [line for line in said.splitlines() if "put in" in line]
    assert kept == "stage train: predictions were not kept: RuntimeError: put in"
    assert read_json(folder / "run.json")["predictions"] == {
        "train": {"status": "failed", "cause": "RuntimeError: put in"}
    }
    assert drawn == [f"expertail: report/{name}.png was not drawn: RuntimeError: put in" for name in pictures]
    assert sent == f"tracking: RuntimeError: put in; later: expertail sync {folder}"
    assert json.loads((folder / "export" / "last" / "model.json").read_text())["class_names"]
