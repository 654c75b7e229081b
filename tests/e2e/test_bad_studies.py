"""A fault in a study, its file, folder or report gives one message with key or file, what is found and needed."""

from __future__ import annotations

import json
import platform
import re
import shutil
from dataclasses import replace

import pytest
import yaml

from orchestration.cli import main
from orchestration.commands.study import _missing_data, plan_study, study
from orchestration.reports.write import write_report
from orchestration.studies.grid import lay_out
from orchestration.studies.study_config import read_study
from orchestration.studies.study_folder import StudyFolder, held
from tests.finished_runs import finish

DIGITS = ("dataset=digits_lt", "engine.threads=1")
ACCURACY = (1.0, 0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.1, 0.0)


def grid(tmp_path, *words):
    return lay_out(read_study([*DIGITS, f"run.dir={tmp_path}", *words]))


def of_file(tmp_path, content, *words):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return grid(tmp_path, f"study={path}", *words)


STUDENT = "method=ride_distill method.stages.train.teachers.teacher.run=sibling"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ce,ride", "method.num_expert=3"], "every recipe: method.num_expert: unknown key"),
        (["method=ce,ride", "method.stages.train.objective.diversity_factor=0.1"], "method=ce: .*diversity_factor"),
        (["method=ce,rid"], "method=rid: no such method, did you mean"),
        (["dataset.imbalance_ratio=50,50.0", "method=ce"], "ratio=50 and .*ratio=50.0: the same run twice"),
        (["method=ce,ce"], "axes.method: ce more than once; needed each value once"),
        (["method=ce", "seed=0,1,0"], "seeds: 0 more than once"),
        (["method=ce", "seed=1.5"], "seed=1.5: needed whole numbers of 0 or more, e.g. seed=0,1,2"),
        (["method=ce", "seed=-1"], "seed=-1: needed whole numbers of 0 or more, e.g. seed=0,1,2"),
        (["method=ce", "seed=one,2"], "seed=one,2: needed whole numbers of 0 or more, e.g. seed=0,1,2"),
        (["method=ce,"], "method=ce,: "),
        (["method=ce", "seeds=1"], "seeds=1: unknown key; did you mean seed=1"),
        (["run.keep_checkpoints=1,2", "method=ce"], "run.keep_checkpoints: changes no result"),
        (["cluster=local,gpu", "method=ce"], "cluster: changes no result"),
        (["method=ce", "run.name=x"], "run.name: .*needed study.name"),
        (["method=ce", "study.paralel=2"], "paralel: unknown key; did you mean parallel"),
        (["method=ce", "study.parallel=0"], "parallel: needed a whole number of 1 or more, or auto; found 0"),
        (["method=ce", "study.retry=all"], "retry: needed 'failed'; found 'all'"),
        (["method=ce", "study.references=some"], "references: needed true or false, or a list of words; found 'some'"),
        (["method=ce", "study.seeds=1"], "study.seeds=1: set in a study's file alone"),
        (["method=ce", "study.report.modle=best"], "report.modle: unknown key; known: model"),
        (["method=ce", "study.report.model=first"], "report.model: .*'last' or 'best'; found 'first'"),
        (["method=ce,ride", "study.baseline=method=tade"], "baseline = method=tade: no run has it"),
        (["method=ce", "run.dir=s3://x/y", "tracking.enabled=false"], "needed a folder; set run.dir"),
        (["method=ce", "study.name=a/b"], "study.name = 'a/b': needed the name of one folder"),
        (["method=ce", "study.name=.x"], "study.name = '.x': needed the name of one folder"),
        (["method=ce", "seed=0,,1"], r"1 problem\n  seed=0,,1: needed whole numbers of 0 or more, e.g. seed=0,1,2"),
        (["study=toor"], "study=toor: no such study, did you mean tour"),
        (["study=a", "study=b"], "study=: named 2 times"),
        (["study=/nowhere/x.yaml"], "study=/nowhere/x.yaml: No such file or directory; needed a YAML file"),
        (["study=/"], "study=/: found a folder; needed a YAML file, or the name of one"),
    ],
)
def test_words_that_are_wrong_are_told_before_anything_starts(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        grid(tmp_path, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "mine.yaml: empty; needed a mapping"),
        ("- method=ce\n", "mine.yaml: found list, needed a mapping"),
        ("method=ce\n", "mine.yaml: found str, needed a mapping"),
        ("axes:\n\tmethod: [ce]\n", r"mine.yaml: not YAML, line 2, column 1: .*needed blanks in the place of tabs"),
        ("axes: {method: [ce\n", "mine.yaml: not YAML, line 2, column 1: "),
        (b"name: \xff\n", "mine.yaml: found bytes that are no text in UTF-8"),
        ("{[method]: ce}\n", "mine.yaml: not YAML, line 1, column 2: found unhashable key"),
        ("words: [pace=demo, pace=generic]\n", "words: pace set twice in pace=demo pace=generic .*; needed once"),
        ("recipes: [method=ce method=ride]\n", "recipes: method set twice in method=ce method=ride; needed once"),
        ("axes: {mix: [none, cmo, null]}\n", "axes.mix: none more than once"),
        ("references: [3]\n", "references: needed true or false, or a list of words"),
        ("of: mine.yaml\n", "mine.yaml: of: .*leads back to itself"),
        ("of: nowhere.yaml\n", "mine.yaml: of: study=nowhere.yaml: No such file or directory"),
        (
            "recipes: [{label: RIDE, 6 experts, words: method=ride}]\n",
            "part of a text with a comma. needed quotes",
        ),
        ("axis: {method: [ce]}\n", "axis: unknown key; did you mean axes"),
        ("recipes: [{words: method=ce, lable: x}]\n", "recipes.0.lable: unknown key; did you mean label"),
        ("seeds: [0]\nseeds: [1]\n", "mine.yaml: not YAML, line 1, column 1: the key seeds is there 2 times"),
        ("axes: {method: [ce], method: [ride]}\n", "the key method is there 2 times"),
        ("axes: [method]\n", "axes: needed a mapping; found "),
        ("axes: {method: []}\n", "axes.method: no value; needed at least one"),
        ("axes: {method: [ce, ride, ce]}\n", "axes.method: ce more than once"),
        ("seeds: 3\n", "seeds: needed a list; found 3"),
        ("seeds: []\n", "seeds: found none; needed at least one, e.g."),
        ("seeds: [0, true]\n", "seeds.1: needed a whole number; found True"),
        ("seeds: [0.5]\n", "seeds.0: needed a whole number; found 0.5"),
        ("seeds: ['1']\n", "seeds.0: needed a whole number; found '1'"),
        ("seeds: [-1]\n", "seeds.0: needed 0 or more; found -1"),
        ("seeds: [1, 1]\n", "seeds: 1 more than once"),
        ("words: dataset=digits_lt\n", "words: needed a list; found 'dataset=digits_lt'"),
        ("words: [{a: b}]\n", "words.0: needed text; found"),
        ("words: [nothing]\n", "nothing: not of the form key=value"),
        ("words: [seed=3]\n", "seed: runs of a study are named and seeded by it; needed seeds"),
        ("words: ['method=ce,ride']\n", "method=ce,ride: needed key=value with one value"),
        ("recipes: [[method=ce]]\n", "recipes.0: needed a mapping; found"),
        ("recipes: [{label: x}]\n", "recipes.0.words: missing; needed words"),
        ("recipes: ['']\n", "recipes: a recipe without words"),
        (
            "recipes: [{label: A, words: method=ce}, {label: A, words: method=ride}]\n",
            "both runs would be A-s0; leave one out, or give one",
        ),
        ("recipes: [method=ce, method=ce]\n", "the same run twice; leave one out"),
        (f"recipes: [method=ride, {STUDENT}:rid]\n", "sibling:rid: no recipe of the study; did you mean sibling:ride?"),
        (
            f"recipes: [method=ride, {{label: x, words: {STUDENT}:ride}}]\n"
            "axes: {dataset.imbalance_ratio: [20, 50]}\nexclude: [{method: ride, dataset.imbalance_ratio: 20}]\n",
            "x: sibling:ride: excluded at dataset.imbalance_ratio=20; needed both there, or none",
        ),
        (f"recipes: [{{label: x, words: {STUDENT}:x}}]\n", "x-s0: each needs another of them, so that none can begin"),
        ("recipes: [method=ce]\naxes: {method: [ride]}\n", "method: set twice, by an axis and by recipe"),
        ("recipes: [method=ce, method=ride]\nwords: [method=tade]\n", "method: set for all runs, and by every recipe"),
        ("axes: {method: [ce]}\nexclude: [{method: ce}]\n", "no run is left: every combination is excluded"),
        ("axes: {method: [ce]}\nexclude: [{method: rid}]\n", "exclude {method: rid}: no run has it; .*as of method=ce"),
        ("axes: {method: [ce]}\nexclude: [{}]\n", "exclude: an exclusion without a pair leaves out every run"),
        ("axes: {method: [ce]}\nexclude: {method: ce}\n", "exclude: needed a list; found"),
        ("baseline: [ce]\n", "baseline: needed text; found"),
        ("name: a/b\n", "study.name = 'a/b': needed the name of one folder"),
        ("name: ' '\n", "name: blank; needed text"),
        ("name: [x]\n", "name: needed text; found"),
        ("report: best\n", "report: needed a mapping; found 'best'"),
        ("missing: [{label: ABL}]\n", "missing.0.why: missing; needed text"),
        ("missing: [ABL]\n", "missing.0: needed a mapping; found 'ABL'"),
        ("parallel: true\n", "parallel: needed a whole number of 1 or more, or auto; found True"),
    ],
)
def test_a_file_that_is_wrong_is_told_before_anything_starts(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        of_file(tmp_path, content)


def test_data_that_are_not_there_are_told_before_any_run_fails_for_them(tmp_path):
    words = ["dataset=image_folder_lt", "dataset.root=/nowhere", "dataset.num_classes=10", "method=ce,ride"]
    words += [f"run.dir={tmp_path}", "study.name=x"]
    missing = "dataset.root = /nowhere: found nothing at /nowhere; needed the folder of its files"
    with pytest.raises(ValueError, match=rf"study x: 1 problem\n  {missing}"):
        study(words)
    assert not list(tmp_path.iterdir())
    assert f"not there  {missing}" in plan_study(words)


def test_a_finished_study_needs_no_data(tmp_path):
    """As one that was copied to a machine where only its report is written."""
    words = ["dataset=image_folder_lt", "dataset.root=/nowhere", "dataset.num_classes=10", "method=ce,ride"]
    grid = lay_out(read_study([*words, f"run.dir={tmp_path}", "study.name=x"]))
    folder = StudyFolder(grid.folder)
    for point in folder.take(grid)[:1]:
        folder.update(point.run, status="finished")
        (folder.path / point.run).mkdir()
        (folder.path / point.run / "config.yaml").touch()
    assert len(_missing_data(grid)) == 1, "one run is left"
    assert _missing_data(replace(grid, points=grid.points[:1])) == []


def test_a_study_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"a study of nothing; needed study=NAME or study=FILE.yaml"):
        read_study([])


def test_none_is_no_mixing_and_no_further_stage_wherever_it_stands(tmp_path):
    (one,) = grid(tmp_path, "method=ce", "mix=none", "then=none").points
    (other,) = of_file(tmp_path, "recipes: [method=ce mix=none then=none]\n").points
    assert one.identity == other.identity == grid(tmp_path, "method=ce").points[0].identity


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"3 problems\n  seeds=1: unknown.*\n  study.parallel: needed.*\n  study.foo: unknown key"
    ):
        grid(tmp_path, "method=ce", "study.foo=1", "seeds=1", "study.parallel=0")


@pytest.mark.parametrize(
    ("key", "values", "labels"),
    [
        ("dataset.balanced", [True, False], ["true", "false"]),
        ("mix", [None, "cmo"], ["none", "cmo"]),
        ("then", [["ncm", "crt"], "crt"], ["[ncm,crt]", "crt"]),
        ("method.stages.train.lr_schedule.milestones", [[], [{"after_epoch": 3, "factor": 0.1}]],
         ["[]", "[{after_epoch:3,factor:0.1}]"]),
        ("method.stages.train.optimizer.lr", ["1e-1", 0.01], ["0.1", "0.01"]),
    ],
)  # fmt: skip
def test_values_of_every_kind_are_those_of_a_command_line(key, values, labels, tmp_path):
    """A truth, null, a list, a mapping and a number: as a word, a label and an exclusion they are the same text."""
    asked = {"words": ["method=ce"], "axes": {key: values}}
    found = of_file(tmp_path, yaml.safe_dump(asked))
    assert [point.label[key] for point in found.points] == labels
    same = grid(tmp_path, "method=ce", f"{key}={','.join(text if text != 'none' else 'null' for text in labels)}")
    assert [point.identity for point in same.points] == [point.identity for point in found.points]
    fewer = of_file(tmp_path, yaml.safe_dump({**asked, "exclude": [{key: values[0]}]}))
    assert [point.identity for point in fewer.points] == [found.points[1].identity]


def test_a_text_with_a_comma_is_one_value(tmp_path):
    study = {"words": ["method=ce"], "axes": {"dataset.augment.name": ["a,b", "standard"]}}
    with pytest.raises(ValueError, match="a,b") as refused:
        of_file(tmp_path, yaml.safe_dump(study))
    assert "needed key=value with one value" not in str(refused.value)


@pytest.mark.parametrize("name", ["price $_$", "50%25 done", "UPPER", "2024", "true", "a b", "ø"])
def test_any_name_of_a_folder_names_a_study(name, tmp_path):
    assert grid(tmp_path, "method=ce", f"study.name={name}").folder == tmp_path / name
    assert of_file(tmp_path, f"name: {yaml.safe_dump(name)}").name == name


def test_a_word_that_replaces_an_axis_takes_its_exclusions_and_its_part_of_the_baseline_along(tmp_path):
    study = "axes: {method: [ce, ride], mix: [none, cmo]}\nexclude: [{method: ce, mix: cmo}]\n"
    study += "baseline: method=ce mix=none\n"
    found = of_file(tmp_path, study, "mix=null")
    assert [point.run for point in found.points] == ["ce-s0", "ride-s0"] and found.baseline == {"method": "ce"}
    with pytest.raises(ValueError, match="baseline = method=ce mix=none: no run has it"):
        of_file(tmp_path, study, "mix=cmo")


# Folders


def taken(tmp_path, *words):
    asked = grid(tmp_path, "study.name=x", *words)
    folder = StudyFolder(asked.folder)
    folder.take(asked)
    return folder.path, asked


def test_two_studies_in_one_folder_are_refused_with_what_differs(tmp_path):
    taken(tmp_path, "method=ce")
    other = grid(tmp_path, "study.name=x", "method=ce", "method.stages.train.epochs=9")
    text = "\n".join(StudyFolder(other.folder).problems_with(other))
    assert "holds another study; 1 difference" in text and "epochs: (unset) -> 9" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "study.json: not valid JSON"),
        ("", "study.json: not valid JSON"),
        ("[]", "study.json: found list, needed a JSON object"),
        ("{}", "study.json: found nothing in it; restore the file, or remove it"),
        ('{"points": 3}', "study.json: found no list of runs under `points`"),
        (
            '{"schema": 9, "points": []}',
            "study.json: schema 9; needed 1 or less; a later version of expertail wrote it",
        ),
        ('{"points": [{"run": "a"}]}', "study.json: found no words, axes, identity"),
    ],
)
def test_a_damaged_study_json_is_named_by_every_command(content, message, tmp_path, capsys):
    path, _ = taken(tmp_path, "method=ce")
    (path / "study.json").write_text(content)
    commands = [["study", *DIGITS, "method=ce", "study.name=x", f"run.dir={tmp_path}", "--plan"]]
    commands += [] if "no words" in message else [[name, str(path)] for name in ("status", "report", "sync")]
    for command in commands:
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_or_is_held_is_told_with_its_holder(tmp_path):
    (tmp_path / "file").write_text("")
    cannot = pytest.raises(
        ValueError, match=r"the study's folder cannot be written \(Not a directory\); make it writable"
    )
    with cannot, held(tmp_path / "file" / "x"):
        pass
    refused = pytest.raises(ValueError, match=r"already being carried out by process \d+ on ")
    with held(tmp_path / "x"), refused, held(tmp_path / "x"):
        pass


def test_a_run_that_is_gone_is_trained_again_and_said_to_be_so(tmp_path, capsys):
    path, asked = taken(tmp_path, "method=ce", "seed=0,1")
    folder = StudyFolder(path)
    for run in ("ce-s0", "ce-s1"):
        finish(path / run, "method=ce", f"seed={run[-1]}", accuracy=ACCURACY, base=(*DIGITS, "tracking.enabled=false"))
        folder.update(run, status="finished")
    shutil.move(path / "ce-s1", tmp_path / "elsewhere")
    assert main(["status", str(path)]) == 0
    assert "1 finished, 1 gone" in capsys.readouterr().out
    (gone,) = write_report([str(path)], print, pictures=False).report.left_out
    assert (gone.run, gone.state) == ("ce-s1", "gone")
    assert gone.why == f"{path / 'ce-s1'} is not there; restore it, or repeat the study"
    assert StudyFolder(path).settle(asked.points, retry=False) == []
    assert "ce-s1: finished once, and" in capsys.readouterr().err
    assert [record["status"] for record in StudyFolder(path).records] == ["finished", "waiting"]


# Reports and status of what is none


@pytest.mark.parametrize(
    ("command", "place", "message"),
    [
        ("status", "nowhere", "nowhere: found nothing there; needed the folder of a study, of runs or of one run"),
        ("status", "empty", "empty: found a folder without study.json, and without runs in it; needed"),
        ("status", "file", "file: found a file; needed"),
        ("report", "nowhere", "nowhere: nothing there; needed folders of runs, or the folder of a study"),
        ("report", "empty", "empty: found a folder without config.yaml, and without runs in it"),
        ("report", "file", "file: found a file; needed the folder of a run"),
        ("sync", "empty", "empty: not a run folder"),
    ],
)
def test_a_place_that_holds_nothing_is_told_in_one_line(command, place, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main([command, place]) == 1
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_a_report_on_the_same_run_twice_shows_it_once_and_says_so(tmp_path):
    run = finish(tmp_path / "ce-s0", "method=ce", accuracy=ACCURACY)
    (tmp_path / "link").symlink_to(run)
    (left,) = write_report([str(run), str(tmp_path / "link")], print, pictures=False).report.left_out
    assert (left.run, left.why) == ("link", f"{tmp_path / 'link'}: the same folder as {run}; shown once")


def test_status_goes_on_past_a_damaged_run(tmp_path, capsys):
    for name in ("a", "b"):
        finish(tmp_path / name, "method=ce", accuracy=ACCURACY)
    (tmp_path / "a" / "run.json").write_text("{")
    assert main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 runs; 1 damaged, 1 finished" in said and f"a: {tmp_path / 'a' / 'run.json'}: not valid JSON" in said


def test_status_knows_a_killed_process_from_one_that_trains(tmp_path, capsys):
    """Both are noted as `running`; who holds the lock tells. One took half an hour, one waits."""
    path, _ = taken(tmp_path, "method=ce", "seed=0,1,2,3")
    folder = StudyFolder(path)
    for run, status in (("ce-s0", "running"), ("ce-s1", "finished")):
        finish(path / run, "method=ce", f"seed={run[-1]}", accuracy=ACCURACY, base=(*DIGITS, "tracking.enabled=false"))
        facts = json.loads((path / run / "run.json").read_text())
        (path / run / "run.json").write_text(json.dumps(facts | {"status": status}))
        folder.update(run, status="running")
    folder.update("ce-s2", status="running")
    with held(path):
        (path / "ce-s0" / ".lock").write_text((path / ".lock").read_text())
        assert main(["status", str(path)]) == 0
    said = capsys.readouterr().out
    assert "4 runs; 1 running, 1 finished, 1 starting, 1 waiting" in said
    assert re.search(r"carried out by process \d+ on .*; about 45.0 min left", said), "(30 + 30 + 30) / 2 min"
    (path / ".lock").write_text(f"process 4194303 on {platform.node()}\n")
    (path / "ce-s0" / ".lock").write_text((path / ".lock").read_text())
    assert main(["status", str(path)]) == 0
    said = capsys.readouterr().out
    assert "4 runs; 2 interrupted, 1 finished, 1 waiting" in said
    assert "nobody carries it out; the same `expertail study` goes on with 3 runs" in said


def test_the_name_of_a_file_that_lies_here_is_told_with_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.yaml").write_text("axes: {method: [ce]}\n")
    with pytest.raises(ValueError, match=r"study=few: no such study; known: .*; here is a file: study=few\.yaml"):
        lay_out(read_study(["study=few"]))
