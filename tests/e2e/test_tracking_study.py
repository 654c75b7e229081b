"""A study in a real MLflow store: rows with means, runs with headline numbers, the report, and the registry."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from orchestration.cli import main
from orchestration.commands.promote import promote
from orchestration.storage.files import read_json, write_json
from orchestration.tracking import process
from orchestration.tracking.headline import NAMES, headline
from orchestration.tracking.process import State, Target
from orchestration.tracking.sender import MlflowSender
from orchestration.tracking.uri import default_uri
from tests.finished_runs import finish

pytestmark = pytest.mark.slow
RARE = (0.10, 0.20, 0.45)  # few-shot accuracy of three seeds
ROW = {"ce": 0.0, "ldam": 0.3}  # what a recipe adds to it


def add_run(study: Path, method: str, seed: int, status: str = "finished", **more) -> None:
    """Add a run to a study's folder and to its study.json."""
    content = read_json(study / "study.json") or {
        "name": study.name,
        "words": [],
        "axes": {},
        "seeds": [],
        "points": [],
    }
    few = RARE[seed] + ROW[method]
    run = finish(
        study / f"{method}-s{seed}", f"method={method}", f"seed={seed}", f"tracking.experiment={content['name']}",
        accuracy=[0.9] * 7 + [few] * 3, best=[0.8] * 7 + [few + 0.05] * 3, predictions=False,
    )  # fmt: skip
    facts = read_json(run / "run.json") | {"study": study.name, "status": status}
    facts |= {"created": 1.7e9 + seed, "ended": 1.8e9 + seed}
    write_json(run / "run.json", facts | {"recipe": {f"method/{method}": {}, "dataset/digits_lt": {}}} | more)
    content["seeds"] = sorted({*content["seeds"], seed})
    point = {"run": run.name, "label": {"method": method}, "seed": seed, "role": "run", "status": status}
    content["points"] = [*content["points"], point]
    write_json(study / "study.json", content)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Make one SQLite store for all tests: its tables take seconds."""
    return default_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture
def study(tmp_path, request):
    folder = tmp_path / request.node.name[:40]
    for method in ROW:
        for seed in (0, 1):
            add_run(folder, method, seed)
    return folder


def runs_by_name(store, experiment):
    client = mlflow.MlflowClient(store, store)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "no run is there twice"
    return {run.info.run_name: run for run in found}


def send(study, store):
    assert main(["sync", str(study), "--uri", store]) == 0


def check(study, store):
    """Compare everything in the store with the run folders; return its runs by name."""
    there = runs_by_name(store, study.name)
    points = read_json(study / "study.json")["points"]
    hours = [read_json(study / point["run"] / "run.json")["cost"]["cpu_hours"] for point in points]
    totals = {f"runs/{status}": sum(p["status"] == status for p in points) for status in ("finished", "failed")}
    assert there[study.name].data.metrics == {**totals, "total/cpu_hours": pytest.approx(sum(hours), abs=1e-4)}
    for method in {point["label"]["method"] for point in points}:
        row, seeds = there[method], {p["seed"]: p["run"] for p in points if p["label"]["method"] == method}
        finished = {s: r for s, r in seeds.items() if read_json(study / r / "run.json")["status"] == "finished"}
        for run in seeds.values():
            assert there[run].data.tags["mlflow.parentRunId"] == row.info.run_id
        for name in headline(study / finished[0]):
            own = [there[run].data.metrics[name] for run in finished.values()]
            assert row.data.metrics[name] == pytest.approx(statistics.fmean(own), abs=0.006)
            if len(own) > 1 and not name.startswith("cost/"):
                assert row.data.metrics[f"sd/{name}"] == pytest.approx(statistics.stdev(own), abs=0.006)
        assert row.data.tags["seeds"] == ",".join(map(str, finished))
        for run in finished.values():
            last = read_json(study / run / "evaluation" / "last.json")["members"]["ensemble"]["top1"]
            best = read_json(study / run / "evaluation" / "best.json")["members"]["ensemble"]["top1"]
            metrics = there[run].data.metrics
            for group in ("all", "many", "medium", "few"):
                assert metrics[f"final/{group}"] == pytest.approx(100 * last[group], abs=1e-3)
            assert metrics["best/few"] == pytest.approx(100 * best["few"], abs=1e-3)
    return there


def test_rows_have_means_of_their_runs_and_grow_with_the_study(study, store):
    send(study, store)
    there = check(study, store)
    assert set(there) == {study.name, "ce", "ldam", "ce-s0", "ce-s1", "ldam-s0", "ldam-s1"}
    assert {run.info.status for run in there.values()} == {"FINISHED"}
    for name in ("ce", study.name):  # sent long after: from the first start of a run to the last end
        assert (there[name].info.start_time, there[name].info.end_time) == (1.7e12, 1.8e12 + 1000)
    tags = there["ldam-s1"].data.tags
    wanted = {"method": "ldam", "mix": "none", "then": "none", "dataset": "digits_lt", "ratio": "20", "experts": "1"}
    assert {key: tags[key] for key in wanted} == wanted
    assert (tags["seed"], tags["study"], tags["recipe"]) == ("1", study.name, "ldam")
    assert "seed" not in there["ldam"].data.params and there["ldam-s1"].data.params["seed"] == "1"

    add_run(study, "ce", 2)
    add_run(study, "ldam", 2, status="failed")
    send(study, store)
    again = check(study, store)
    assert again["ce"].data.tags["seeds"] == "0,1,2" and again["ldam"].data.tags["seeds"] == "0,1"
    assert (again["ce"].info.status, again["ldam"].info.status) == ("FINISHED", "FAILED")
    assert not set(NAMES) & set(again["ldam-s2"].data.metrics), "a failed run has no final number"
    assert {name: run.info.run_id for name, run in there.items()}.items() <= {
        name: run.info.run_id for name, run in again.items()
    }.items()


def test_means_and_report_follow_the_study_while_it_trains(study, store):
    """The uploader of the study's folder sees a run end, and a report that is written again."""
    facts = read_json(study / "ce-s1" / "run.json")
    write_json(study / "ce-s1" / "run.json", facts | {"status": "running"})
    content = read_json(study / "study.json")
    content["points"][1]["status"] = "running"
    write_json(study / "study.json", content)
    sender = MlflowSender(study, Target(store, study.name, study.name))
    sender.connect()
    sender.describe()
    row = runs_by_name(store, study.name)["ce"]
    assert (row.info.status, row.data.tags["seeds"], row.data.metrics["final/few"]) == ("RUNNING", "0", 10.0)
    assert not any(name.startswith("sd/") for name in row.data.metrics)
    sender.close("KILLED")  # as after the driver's death: nobody trains the row any more
    ended = {name: run.info.status for name, run in runs_by_name(store, study.name).items()}
    assert (ended["ce"], ended["ldam"], ended[study.name]) == ("KILLED", "FINISHED", "KILLED")

    write_json(study / "ce-s1" / "run.json", facts)
    content["points"][1]["status"] = "finished"
    write_json(study / "study.json", content)
    for text in ("first", "second"):
        (study / "report").mkdir(exist_ok=True)
        for name in ("index.html", "report.md", "report.csv", "report.tex", "report.json", "groups-1.png"):
            (study / "report" / name).write_text(f"# {text}\n\n{name}\n\n")
        sender.describe()
        there = runs_by_name(store, study.name)
        client = mlflow.MlflowClient(store, store)
        files = {file.path for file in client.list_artifacts(there[study.name].info.run_id, "report")}
        assert {Path(name).suffix for name in files} == {".html", ".md", ".csv", ".tex", ".json", ".png"}
        kept = client.download_artifacts(there[study.name].info.run_id, "report/report.md")
        assert Path(kept).read_text().startswith(f"# {text}")
        assert f"# {text}" in there[study.name].data.tags["mlflow.note.content"]
    assert there["ce"].info.status == "FINISHED" and there["ce"].data.tags["seeds"] == "0,1"
    assert there["ce"].data.metrics["final/few"] == pytest.approx(15.0)
    assert there["ce"].data.metrics["sd/final/few"] == round(5 * 2**0.5, 2)


def test_answers_that_are_lost_on_the_way_lose_and_double_nothing(study, store, monkeypatch):
    """The store does what it is asked, and the first answer to every kind of request is lost."""
    kinds = ("create_experiment", "create_run", "update_run", "log_batch", "set_terminated", "log_artifact", "set_tag")
    lost = list(kinds)

    def losing(kind, real):
        def call(*args, **kwargs):
            answer = real(*args, **kwargs)
            if kind in lost:
                lost.remove(kind)
                raise OSError("connection reset")
            return answer

        return call

    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: None))
    for kind in kinds:
        monkeypatch.setattr(mlflow.MlflowClient, kind, losing(kind, getattr(mlflow.MlflowClient, kind)))
    send(study, store)
    assert set(lost) <= {"update_run", "set_tag"}
    there = check(study, store)
    client = mlflow.MlflowClient(store, store)
    for name in ("ce-s0", "ce"):
        assert len(client.get_metric_history(there[name].info.run_id, "final/few")) <= 2, "one answer was lost"


def test_a_copied_study_has_runs_of_its_own_and_a_moved_one_keeps_its(study, store, tmp_path):
    send(study, store)
    client = mlflow.MlflowClient(store, store)
    experiment = client.get_experiment_by_name(study.name).experiment_id

    def everything():
        runs = client.search_runs([experiment])
        return {run.info.run_id: (run.data.metrics, run.data.params, run.data.tags, run.info.status) for run in runs}

    before = everything()
    copy = shutil.copytree(study, tmp_path / "copy")
    add_run(copy, "ce", 2)
    assert main(["sync", str(copy / "ce-s0"), "--uri", store]) == 0  # a run alone settles its study, too
    send(copy, store)
    after = everything()
    assert {run_id: after[run_id] for run_id in before} == before
    new = [tags for run_id, (_, _, tags, _) in after.items() if run_id not in before]
    assert len(new) == len(before) + 1
    assert {tags.get("mlflow.parentRunId") for tags in new} & before.keys() == set()

    moved = shutil.move(study, tmp_path / "moved")
    add_run(Path(moved), "ldam", 2)
    send(moved, store)
    assert len(everything()) == len(after) + 1


def test_the_alias_of_a_study_is_its_best_run_by_the_split_that_chose_the_epochs(study, store, capsys):
    client, name = mlflow.MlflowClient(store, store), f"{study.name}-digits_lt"
    with pytest.raises(ValueError, match="ce-s0, ce-s1, ldam-s0, ldam-s1 are without it; send what is missing"):
        promote_of(study, store)
    client.create_registered_model(name)
    for number, point in enumerate(read_json(study / "study.json")["points"], 1):
        client.create_model_version(name, f"file:///nowhere/{number}")
        state = State(study / point["run"], Target(store, study.name, point["run"]))
        state.values["models"] = {"best": f"models:/{name}/{number}"}
        state.save()
    assert main(["promote", str(study), "--uri", store]) == 0
    assert "@best is version 4, best of ldam-s1 (new); the best of 4 by accuracy on TEST" in capsys.readouterr().out
    assert client.get_model_version_by_alias(name, "best").version == 4

    best = study / "ce-s0" / "evaluation" / "best.json"
    write_json(best, read_json(best) | {"selected_value": 0.99})
    assert "best of ce-s0 (before: version 4)" in promote_of(study, store)
    write_json(best, read_json(best) | {"selected_on": "val"})
    with pytest.raises(ValueError, match="chosen on different splits"):
        promote_of(study, store)


def promote_of(study, store):
    return promote(str(study), "best", "", "best", store)
