"""`expertail plan --probe`: a few real steps, and the estimates drawn from them."""

from __future__ import annotations

import json
import time

import pytest

from orchestration.cli import main
from orchestration.config.compose import load_config
from orchestration.preflight.probe import probe
from tests import runs

pytestmark = [pytest.mark.drill, pytest.mark.ray]

FAR = 2.5  # times too long or too short: tests share the machine


def test_a_probe_takes_steps_of_every_stage_and_leaves_nothing(local_ray, tmp_path, capsys):
    """LFME: three experts that the student learns from, so that their probes' models are its teachers."""
    words = ["method=lfme", "dataset.image_size=16", "engine.threads=1", "cluster.cpus_per_worker=0.3"]
    assert main(["plan", "--probe", *words, f"run.dir={tmp_path}/runs"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.partition("\ntime\n")[2].splitlines()[2:6]}
    assert list(rows) == ["many", "medium", "few", "student"]
    assert all(float(row[2]) > 0 for row in rows.values())
    assert "CPU-hours of 1 worker; 3 stages at a time" in text
    assert "n/a: nothing was run" not in text
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_probe_is_refused_as_a_training_would_be(local_ray, tmp_path, capsys):
    assert main(["plan", "--probe", "cluster.cpus_per_worker=1000", f"run.dir={tmp_path}/runs"]) == 1
    assert "has places for 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[], ["cluster.workers=3"]], ids=["packed", "spread"])
def test_a_run_takes_about_as_long_as_its_probe_said(words, local_ray, tmp_path, record_property):
    words = [*words, "cluster.cpus_per_worker=0.3", "method.stages.train.epochs=8"]
    found = probe(load_config([*runs.SMALL, *words, f"run.dir={tmp_path}"]), time.time())
    (stage,) = found.stages
    said = stage.seconds(stage.spread()[0]) - stage.begin_s
    assert runs.train(tmp_path / "run", *words) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = lines[-1]["time"] - lines[0]["time"]
    record_property("said_s", said)
    record_property("measured_s", measured)
    print(f"\nsaid {said:.1f} s, measured {measured:.1f} s, ratio {measured / said:.2f}")
    assert (stage.steps, stage.evaluations) == (max(runs.losses(tmp_path / "run")), 8)
    assert 1 / FAR < measured / said < FAR
