from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from orchestration.commands import sweep as sweep_module
from orchestration.commands import sync as sync_module
from orchestration.commands.sweep import _upload_if_interrupted, plan_sweep
from orchestration.config.compose import load_config, to_yaml
from orchestration.results.sweep_table import draw_sweep, sweep_table
from orchestration.storage.files import read_json
from orchestration.storage.journal import Journal
from orchestration.storage.run_folder import RunFolder
from orchestration.tracking.ownership import settle_ownership
from orchestration.tracking.process import State, Target

RATIO = "method.stages.h2t.flow.ratio"
H2T = ["method=ride_h2t", "dataset=digits_lt"]


def plan(variation, tmp_path, *words):
    return plan_sweep(variation, [*H2T, f"run.dir={tmp_path}", *words])


def test_every_value_gets_a_run_named_after_it(tmp_path):
    key, points, folder = plan(f"{RATIO}=0,0.25,1", tmp_path, "seed=4")
    assert (key, folder) == (RATIO, tmp_path / "ride_h2t-digits_lt-s4-sweep")
    assert [point.folder.name for point in points] == [f"ride_h2t-digits_lt-s4-{v}" for v in ("0", "0.25", "1")]
    assert [point.config.method.stages["h2t"].flow.ratio for point in points] == [0, 0.25, 1]
    assert not list(tmp_path.iterdir())


def test_a_run_of_a_sweep_is_the_run_that_train_makes(tmp_path):
    _, points, _ = plan(f"{RATIO}=0.1,0.5", tmp_path, "run.name=x")
    same = load_config([*H2T, f"{RATIO}=0.5", f"run.dir={tmp_path}", "run.name=x-0.5"])
    assert points[1].config == same


@pytest.mark.parametrize(
    ("variation", "words", "names", "folder"),
    [
        (
            "method=ce,ldam",
            ["then=[joint,ncm,crt]"],
            ["ce+joint+ncm+crt-digits_lt-s0", "ldam+joint+ncm+crt-digits_lt-s0"],
            "method+joint+ncm+crt-digits_lt-s0-sweep",
        ),
        (
            "then=crt,[ncm,lws]",
            ["method=ce", "mix=mixup"],
            ["ce+mixup+crt-digits_lt-s0", "ce+mixup+ncm+lws-digits_lt-s0"],
            "ce+mixup+then-digits_lt-s0-sweep",
        ),
        (
            "mix=mixup,null",
            ["method=ce", "seed=3"],
            ["ce+mixup-digits_lt-s3", "ce-digits_lt-s3"],
            "ce+mix-digits_lt-s3-sweep",
        ),
        (
            "mix=null,cmo",
            ["method=mislas"],
            ["mislas+unmixed-digits_lt-s0", "mislas+cmo-digits_lt-s0"],
            "mislas+mix-digits_lt-s0-sweep",
        ),
        ("method=ce,ldam", ["run.name=x"], ["x-ce", "x-ldam"], "x-sweep"),
        ("pace=demo,generic", [], ["ride-digits_lt-s0-demo", "ride-digits_lt-s0-generic"], "ride-digits_lt-s0-sweep"),
    ],
)
def test_recipes_vary_by_their_parts_and_are_named_after_them(variation, words, names, folder, tmp_path):
    _, points, found = plan_sweep(variation, [*words, f"run.dir={tmp_path}"])
    assert [point.folder.name for point in points] == names
    assert found.name == folder


def test_any_value_gives_a_valid_name(tmp_path):
    key = "method.stages.train.lr_schedule.milestones"
    _, points, _ = plan(f"{key}=[],[{{after_epoch: 3, factor: 0.1}}]", tmp_path, "run.name=x")
    assert [point.folder.name for point in points] == ["x-_", "x-after_epoch_3_factor_0.1"]


@pytest.mark.parametrize(
    ("variation", "words", "message"),
    [
        (f"{RATIO}=0.5", [], "one value; needed KEY=V1,V2"),
        (f"{RATIO}=0.5,0.50", [], "found only 1 different value"),
        ("nothing", [], "needed KEY=V1,V2"),
        ("dataset=digits_lt,cifar10_lt", [], "compares runs on the same data"),
        ("then=ncm,crt,crt2", [], "then=crt2: no such then, did you mean then=crt"),
        (f"{RATIO}=0,2", [], "needed 1 or less"),
        ("method.stages.h2t.flow.rato=0,1", [], "did you mean method.stages.h2t.flow.ratio"),
        (f"{RATIO}=0,1", [f"{RATIO}=0.3"], "set twice"),
        ("run.keep_checkpoints=1,2", [], "both runs would compute the same"),
        ("seed=1,2", ["dataset.imbalance_ratio=1,2"], "with one value"),
    ],
)
def test_a_malformed_sweep_is_refused_before_anything_is_written(variation, words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(variation, tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_with_its_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x-0\.25'.*of at most 200 bytes") as refused:
        plan(f"{RATIO}=0.25,1", tmp_path, f"run.name={'x' * 197}")
    assert "x-1'" not in str(refused.value), "199 bytes"
    assert not list(tmp_path.iterdir())


def test_what_ended_a_sweep_is_reported_though_its_uploader_does_not_start(tmp_path, capsys):
    config = plan(f"{RATIO}=0,1", tmp_path)[1][0].config
    missing = tmp_path / "x-sweep"
    with pytest.raises(FloatingPointError, match="first"), _upload_if_interrupted(missing, config):
        raise FloatingPointError("what happened first")
    said = capsys.readouterr().err
    assert "were not uploaded (FileNotFoundError" in said and f"expertail sync {missing}" in said


@pytest.mark.parametrize("command", ["sweep", "sync"])
def test_a_copied_sweep_has_an_mlflow_run_of_its_own_before_its_runs_name_it_as_their_parent(
    command, tmp_path, monkeypatch
):
    (original := tmp_path / "a" / "x-sweep").mkdir(parents=True)
    settle_ownership(original)
    (state := State(original, Target("sqlite:////a.db", "expertail", "x-sweep"))).save()
    (copied := tmp_path / "b" / "x-0").mkdir(parents=True)
    (copied / "config.yaml").write_text(to_yaml(plan(f"{RATIO}=0,1", tmp_path / "b", "run.name=x")[1][0].config))
    copy = shutil.copytree(original, tmp_path / "b" / "x-sweep")
    seen = []

    def begin_run(*_):
        seen.append(read_json(copy / "tracking.json"))

    if command == "sync":
        (copy / "sweep.json").write_text(json.dumps({"runs": [{"run": "x-0"}]}))
        sync_whole = sync_module.sync_run
        monkeypatch.setattr(sync_module, "sync_run", begin_run)
        monkeypatch.setattr(sync_module, "sync", lambda *_: None)
        sync_whole(str(copy), None)
    else:
        shutil.rmtree(copied)
        monkeypatch.setattr(sweep_module, "cluster", lambda address: contextlib.nullcontext())
        monkeypatch.setattr(sweep_module, "train_and_report", begin_run)
        monkeypatch.setattr(sweep_module, "start_uploader", lambda *_: None)
        sweep_module.sweep(f"{RATIO}=0,1", [*H2T, f"run.dir={tmp_path / 'b'}", "run.name=x"])
    assert seen[0]["folder"]["path"] == str(copy) and state.values["key"] not in json.dumps(seen[0])


def test_folders_of_other_runs_are_refused_and_all_named(tmp_path):
    _, points, folder = plan(f"{RATIO}=0,1", tmp_path, "run.name=x")
    other = load_config([*H2T, f"{RATIO}=1", "method.stages.train.epochs=8", "engine.threads=1"])
    run = RunFolder(points[1].folder)
    run.write_config(other)
    run.close()
    with Journal(points[1].folder) as journal:
        journal.append("train", 1, 1, {"train/loss": 1.0})
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"key": "seed", "config": {}}))
    with pytest.raises(ValueError, match="holds a sweep over seed") as refused:
        plan(f"{RATIO}=0,1", tmp_path, "run.name=x")
    assert "x-1: this run was started with another config" in str(refused.value)
    assert "method.stages.train.epochs: 8 -> 24" in str(refused.value)


def outcome(value, few, by_index=0.5, status="finished", **more):
    found = {"value": value, "run": f"x-{value}", "status": status, "problem": None, "stages_taken": {}, **more}
    if status == "finished":
        top1 = {"all": 0.5, "many": 0.9, "medium": None, "few": few}
        top1 |= {f"{group}_by_index": by_index for group in ("many", "medium", "few")}
        found |= {"top1": top1, "stage": "h2t", "epoch": 2, "step": 9, "split": "test"}
    return found


def result(*runs, key=RATIO):
    sizes = {"many": 3, "medium": 0, "few": 7}
    return {"key": key, "method": "m", "dataset": "d", "seed": 3, "runs": list(runs), "group_sizes": sizes}


def test_the_table_has_a_row_for_every_value_and_names_shared_stages_and_failures():
    taken = {"stages_taken": {"train": "x-0"}}
    runs = [outcome("0", 0.25), outcome("0.5", 0.375, **taken), outcome("1", None, **taken)]
    runs.append(outcome("2", None, status="failed", problem="the loss is not finite"))
    text = sweep_table(result(*runs))
    rows = [line.split() for line in text.splitlines() if line.endswith(("x-0", "x-0.5", "x-1"))][:3]
    assert rows[0] == ["0", "50.00", "90.00", "n/a", "25.00", "x-0"]
    assert rows[1][4] == "37.50" and rows[2][4] == "n/a"
    assert "stage train: trained once, in x-0, and taken over by x-0.5, x-1" in text
    assert "2: failed: the loss is not finite" in text
    assert "few [7]" in text and "by index" in text and "seed 3, one run per value: no spread" in text
    assert "nan" not in text.lower()
    assert "by index" not in sweep_table(result(outcome("0", 0.25, by_index=None)))
    assert "seed 3" not in sweep_table(result(outcome("0", 0.25), key="seed"))


@pytest.mark.parametrize("values", [("1", "0.25", "0"), ("0.001", "0.1", "1"), ("ride", "a rather long value", "[1]")])
@pytest.mark.slow
def test_the_picture_is_drawn_for_numbers_and_for_words(values, tmp_path):
    runs = [outcome(value, 0.1 * k) for k, value in enumerate(values)]
    assert draw_sweep(tmp_path, result(*runs, outcome("9", None, status="stopped"))) == "sweep.png"
    with Image.open(tmp_path / "sweep.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


def test_there_is_no_picture_before_a_run_is_finished(tmp_path):
    assert "no run is finished" in draw_sweep(tmp_path, result(outcome("0", None, status="stopped")))
    assert not list(tmp_path.iterdir())


def with_finals(value, loss, seed, few=0.25):
    """Make the outcome of a run that ended with the final stages ncm and crt."""
    found = outcome(value, few) | {"loss": loss, "seed": seed}
    return found | {"finals": {"ncm": found["top1"] | {"few": 0.125}, "crt": found["top1"]}}


def cells(text, label):
    return next(line.removeprefix(label).split() for line in text.splitlines() if line.startswith(label))


def test_losses_with_several_final_stages_are_a_table_of_losses_by_classifiers():
    runs = [with_finals("ce", "ce", 3), with_finals("ldam", "ldam", 3), outcome("ride", None, status="stopped")]
    runs[2] |= {"loss": "ride", "seed": 3}
    text = sweep_table(result(*runs, key="method"))
    assert "last model of every final stage of each run; seed 3, one run per value: no spread" in text
    assert cells(text, "ldam ") == ["90.0", "n/a", "12.5", "50.0", "90.0", "n/a", "25.0", "50.0"]
    assert cells(text, "ride ") == ["n/a"] * 8
    assert "ride: stopped" in text


def test_seeds_with_several_final_stages_share_a_row():
    text = sweep_table(result(*(with_finals(str(k), "ce", k, 0.1 + k / 10) for k in range(3)), key="seed"))
    assert cells(text, "ce ")[6] == "20.0" and cells(text, "  3 seeds")[6] == "±10.0"
    assert "no spread" not in text
    other = sweep_table(result(with_finals("0.1", "ce", 3), with_finals("0.2", "ce", 3), key="a.b.lr"))
    assert len(cells(other, "lr 0.1")) == 8, "neither losses nor seeds: a row per value"


def test_a_run_with_one_final_stage_has_its_column_among_those_with_several():
    alone = outcome("h2t", 0.375) | {"loss": "ce", "seed": 3}
    text = sweep_table(result(with_finals("[ncm,crt]", "ce", 3), alone, key="then"))
    assert cells(text, "then h2t ") == ["n/a"] * 8 + ["90.0", "n/a", "37.5", "50.0"]


@pytest.mark.slow
def test_the_picture_has_a_row_of_panels_for_every_final_stage(tmp_path):
    runs = [with_finals("ce", "ce", 3), with_finals("ldam", "ldam", 3)]
    assert draw_sweep(tmp_path, result(*runs, key="method")) == "sweep.png"
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.height == pytest.approx(110 * (0.8 + 3.8 * 2), abs=1)
