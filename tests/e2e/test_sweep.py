"""A sweep trains stages that its values share once, and its runs equal those of `expertail train`."""

from __future__ import annotations

import json
import os
import signal

import pytest

from orchestration.cli import main
from orchestration.commands import sweep
from orchestration.runs.stage_run import StageRun
from tests import runs

pytestmark = pytest.mark.ray

RATIO = "method.stages.h2t.flow.ratio"
WORDS = [
    "method=dr_h2t", "dataset=digits_lt", "dataset.image_size=8", "engine.threads=1", "tracking.enabled=false",
    "method.stages.train.batch_size=135", "method.stages.train.epochs=2", "method.stages.h2t.batch_size=135",
    "method.stages.h2t.epochs=1", "method.stages.train.lr_schedule.milestones=[]",
]  # fmt: skip


def taken(folder):
    return json.loads((folder / "run.json").read_text()).get("stages_taken", {})


def test_a_sweep_shares_a_stage_goes_on_where_it_was_stopped_and_ends_as_single_runs_do(warm, tmp_path, capsys):
    words = [*WORDS, f"run.dir={tmp_path}", "run.name=x"]

    def stop(*run, take=sweep.take_over_stages):
        """Stop in the second run, right after its first stage was taken over."""
        if take(*run):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "take_over_stages", stop)
        assert main(["sweep", f"{RATIO}=0,0.5", *words]) == 130
    kept = json.loads((tmp_path / "x-sweep" / "sweep.json").read_text())
    assert [run["status"] for run in kept["runs"]] == ["finished", "not begun"]
    capsys.readouterr()

    assert main(["sweep", f"{RATIO}=0,0.5", *words]) == 0
    printed = capsys.readouterr()
    assert "stage train: trained once, in x-0, and taken over by x-0.5" in printed.out
    assert printed.out.count("Top-1") == 2
    assert "run 1 of 1" in printed.err
    assert taken(tmp_path / "x-0") == {} and taken(tmp_path / "x-0.5") == {"train": "x-0"}
    assert (tmp_path / "x-0" / "report" / "regions.png").exists()
    assert (tmp_path / "x-sweep" / "sweep.png").exists()
    result = json.loads((tmp_path / "x-sweep" / "sweep.json").read_text())
    for run in result["runs"]:
        last = json.loads((tmp_path / run["run"] / "evaluation" / "last.json").read_text())
        assert run["top1"] == last["members"]["ensemble"]["top1"]

    assert main(["train", *words[:-1], "run.name=alone", f"{RATIO}=0.5"]) == 0
    alone, ours = tmp_path / "alone", tmp_path / "x-0.5"
    assert runs.points(ours) == runs.points(alone)
    for name in ("last", "best"):
        assert (ours / "evaluation" / f"{name}.json").read_text() == (alone / "evaluation" / f"{name}.json").read_text()
    assert runs.weights(ours) == runs.weights(alone)

    before = {path: path.stat().st_mtime_ns for path in ours.rglob("*.json")}
    capsys.readouterr()
    assert main(["sweep", f"{RATIO}=0,0.5", *words]) == 0
    assert "trained once" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in ours.rglob("*.json")} == before


@pytest.mark.drill
def test_a_value_whose_loss_is_not_finite_is_noted_and_the_others_go_on(warm, tmp_path, capsys):
    key = "method.stages.h2t.optimizer.lr"
    words = [*WORDS, f"run.dir={tmp_path}", "run.name=y"]
    assert main(["sweep", f"{key}=1e38,0.1", *words]) == 1
    printed = capsys.readouterr().out
    assert "1e+38: failed: stage h2t, epoch 1" in printed
    found = json.loads((tmp_path / "y-sweep" / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in found] == ["failed", "finished"]
    assert found[1]["stages_taken"] == {"train": found[0]["run"]}, "its stage train had ended well"


def test_a_signal_ends_a_sweep_after_a_checkpoint(warm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StageRun, "_begin", lambda stage: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["sweep", "seed=0,1", *WORDS, f"run.dir={tmp_path}", "run.name=z"]) == 128 + signal.SIGTERM
    assert "the same command continues" in capsys.readouterr().err
    kept = json.loads((tmp_path / "z-sweep" / "sweep.json").read_text())
    assert [run["status"] for run in kept["runs"]] == ["stopped", "not begun"]
