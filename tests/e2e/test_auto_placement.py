"""`cluster.experts_per_worker=auto`: measured at the first start of a run, and kept by the run."""

from __future__ import annotations

import json

import pytest

from orchestration.config.compose import from_yaml
from orchestration.preflight import placements
from tests import runs

pytestmark = [pytest.mark.drill, pytest.mark.ray]

WORDS = ["method=ride", "cluster.workers=3", "cluster.experts_per_worker=auto", "cluster.cpus_per_worker=0.3"]


def test_a_run_chooses_its_placement_once(local_ray, tmp_path, monkeypatch, capsys):
    assert runs.train(tmp_path / "run", *WORDS, "run.max_steps=4") == 0
    assert "cluster.experts_per_worker=auto is " in capsys.readouterr().err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    chosen = run["placement"]["experts_per_worker"]
    assert chosen in (1, 3) and run["mesh"]["experts_per_worker"] == chosen
    assert run["placement"]["measured"], run["placement"]
    assert set(run["placement"]["predicted_step_s"]) == {
        "packed", "spread, 1 expert per worker", "3 replicas of the whole ensemble",
    }  # fmt: skip
    assert from_yaml(tmp_path / "run" / "config.yaml").cluster.experts_per_worker == chosen

    monkeypatch.setattr(placements, "measure_for", lambda *args: pytest.fail("measured again"))
    assert runs.train(tmp_path / "run", *WORDS, "run.max_steps=8") == 0
    assert runs.train(tmp_path / "run", *WORDS) == 0
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert again["placement"] == run["placement"] and again["mesh"] == run["mesh"]
    assert max(runs.losses(tmp_path / "run")) == 27
