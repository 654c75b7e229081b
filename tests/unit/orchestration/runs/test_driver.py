"""The driver leaves the results of the last stage as the run's, whatever ended after it."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

from orchestration.config.compose import load_config
from orchestration.runs import driver
from orchestration.runs.stage_run import write_evaluations
from orchestration.runs.stopping import Outcome
from orchestration.storage.run_folder import RunFolder

STEPS = "sampler: {name: instance_balanced}, objective: {name: cross_entropy}, optimizer: {lr: 0.1}, batch_size: 50"
STAGE = f"epochs: 2, lr_schedule: {{name: cosine}}, {STEPS}"


def test_the_last_stages_results_are_the_runs_though_another_stage_ends_later(tmp_path, monkeypatch):
    """The first stage, which "second" begins with, trains beside "last" and ends after it."""
    words = [f"method.stages.second={{{STAGE}}}", f"method.stages.last_one={{{STAGE}, after: []}}"]
    config = load_config(["method=ce", "dataset=digits_lt", *words])
    assert config.method.waves() == [["train", "last_one"], ["second"]]
    states = {name: {"best": None, "last": {"evaluation": {"stage": name}}} for name in config.method.stages}

    with contextlib.closing(RunFolder(tmp_path / "run")) as folder:

        def train_wave(self, stages, before):
            for stage in reversed(stages):
                write_evaluations(folder, config, stage, states[stage])
            return [Outcome(stage, True, 1, tmp_path) for stage in stages]

        monkeypatch.setattr(driver.Driver, "_train_wave", train_wave)
        checkpoints = SimpleNamespace(
            stages=list(states), clean=lambda: None, newest=lambda stage, report: SimpleNamespace(state=states[stage])
        )
        console = SimpleNamespace(message=print)
        run = SimpleNamespace(
            config=config, folder=folder, checkpoints=checkpoints, journal=contextlib.nullcontext(), console=console
        )
        assert driver.Driver(run, None).carry_out().finished

    evaluation = tmp_path / "run" / "evaluation"
    assert json.loads((evaluation / "last.json").read_text()) == {"stage": "last_one"}
    assert json.loads((evaluation / "second" / "last.json").read_text()) == {"stage": "second"}
