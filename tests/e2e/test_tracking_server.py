"""Drills: a real MLflow server on a real PostgreSQL is gone, slow, broken or wrong, and no point is lost or doubled.

Each trains digits beside a fault. It passes when training keeps its pace, the command ends with 0, and MLflow, read
from PostgreSQL, holds every point of the run's journal once.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.runs.stage_run import StageRun
from orchestration.storage.journal import read_journal
from orchestration.tracking import contents as tracking_contents
from orchestration.tracking.headline import headline, mean_and_spread
from tests import runs
from tests.conftest import lend
from tests.mlflow_server import Fault, PostgreSQL, Proxy, Server, hurry

pytestmark = [pytest.mark.drill, pytest.mark.ray]

WORDS = [word for word in runs.SMALL if not word.startswith("tracking.")]
STEPS = 27
PASSWORD = "s3cret-Pa55"


@pytest.fixture(scope="module")
def postgresql():
    database = PostgreSQL()
    yield database
    database.remove()


@pytest.fixture(scope="module")
def server(postgresql, tmp_path_factory):
    """Start one server for all drills, each with its own experiment; start it again after a drill has killed it."""
    server = Server(postgresql.create("mlflow"), tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server):
    server.start()
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


class Drill:
    """A run with events at steps; its pace is measured without them."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self.folder, self.experiment = folder, experiment
        self.happened_s = 0.0

    def train(self, uri: str, *words: str, events: dict | None = None) -> int:
        """Run the command in this process. `events`: step -> function to call once the step is done."""
        left = sorted((events or {}).items())
        note = StageRun._note

        def note_and_act(stage_run, *arguments):
            note(stage_run, *arguments)
            stage_run.journal.flush()
            while left and stage_run.step >= left[0][0]:
                start = time.monotonic()
                left.pop(0)[1]()
                self.happened_s += time.monotonic() - start

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StageRun, "_note", note_and_act)
            code = runs.train(
                self.folder, f"tracking.uri={uri}", f"tracking.experiment={self.experiment}", *words, common=WORDS
            )
        assert not left, f"training ended before step {left[0][0]}"
        return code

    @property
    def pace_s(self) -> float:
        """Return the seconds from the first step's end to the last one's, without the drill's own events."""
        times = [r["time"] for r in runs.records(self.folder) if r["name"] == "train/loss"]
        assert len(times) == STEPS
        return times[-1] - times[0] - self.happened_s


class Alone:
    """Train the same without tracking."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self.points = None
        self.pace_s = 0.0
        self.measure()

    def measure(self) -> None:
        folder = self._folder / f"alone-{next(self._numbers)}"
        assert runs.train(folder) == 0
        times = [r["time"] for r in runs.records(folder) if r["name"] == "train/loss"]
        self.pace_s = max(self.pace_s, times[-1] - times[0])
        self.points = runs.points(folder)

    def check(self, drill: Drill) -> None:
        """Compare the numbers, and the pace: at most half as long again and 3 s more, measured twice where needed.

        On a machine that others use: three times as long and 5 s. Waiting for every request would add more.
        """
        assert runs.points(drill.folder) == self.points
        others = os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
        times, more_s = (3.0, 5.0) if others else (1.5, 3.0)
        if drill.pace_s > times * self.pace_s + more_s:
            self.measure()
        print(f"{drill.experiment}: {STEPS} steps in {drill.pace_s:.1f} s, alone {self.pace_s:.1f} s")
        assert drill.pace_s <= times * self.pace_s + more_s


@pytest.fixture(scope="module")
def alone(warm_pool, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        yield Alone(tmp_path_factory.mktemp("alone"))


@pytest.fixture
def drill(warm, alone, tmp_path, request):
    return Drill(tmp_path / "run", request.node.name)


def client(uri):
    import mlflow

    return mlflow.MlflowClient(uri, uri)


def the_run(store, experiment, name="run"):
    """Return the MLflow run of that name: there must be exactly one."""
    experiment_id = client(store).get_experiment_by_name(experiment).experiment_id
    (run,) = client(store).search_runs([experiment_id], f"attributes.run_name = '{name}'")
    return run


def held(store, run):
    """Return every point of a run in PostgreSQL except system metrics; a doubled point comes twice."""
    keys = [key for key in run.data.metrics if not key.startswith("system/")]
    points = [point for key in keys for point in client(store).get_metric_history(run.info.run_id, key)]
    return sorted((point.key, point.step, point.value, point.timestamp) for point in points)


def noted(folder):
    """Return every point that a run folder has: those of its journal, and headline metrics."""
    run = json.loads((folder / "run.json").read_text())
    final = [(name, 0, value, round(run["ended"] * 1000)) for name, value in headline(folder).items()]
    stages = list(tracking_contents.read_config(folder)["method"]["stages"])
    journal = [
        (tracking_contents.metric_key(r.name, r.stage, stages), r.step, r.value, round(r.time * 1000))
        for r in read_journal(folder)
    ]
    return sorted(journal + final)


def check_whole(server, drill, status="FINISHED", models=True):
    """Check that MLflow has what the run folder has: points read from PostgreSQL, files through the server."""
    import mlflow

    run = the_run(server.store, drill.experiment)
    assert held(server.store, run) == noted(drill.folder)
    assert run.info.status == status
    config = tracking_contents.read_config(drill.folder)
    facts = json.loads((drill.folder / "run.json").read_text())
    assert run.data.params == tracking_contents.parameters(config, facts)
    assert set(run.data.params) == set(facts["parameters"])
    data = json.loads((drill.folder / "data.json").read_text())
    assert run.data.tags["dataset_digest"] == data["digest"]
    assert run.data.tags["status"] == "finished"
    assert len(run.inputs.dataset_inputs) == 1
    served = client(server.uri)
    for name, content in tracking_contents.files(drill.folder).items():
        sent = Path(served.download_artifacts(run.info.run_id, name))
        assert sent.read_bytes() == (content.encode() if isinstance(content, str) else content.read_bytes()), name
    mlflow.set_tracking_uri(server.uri)  # load_table searches there, whatever its client was given
    table = served.load_table(run.info.experiment_id, tracking_contents.PER_CLASS_FILE, [run.info.run_id])
    assert len(table) == len(data["counts"])
    if models:
        digests = {digest for _, digest in tracking_contents.exported_models(drill.folder).values()}
        versions = client(server.store).search_model_versions(f"run_id = '{run.info.run_id}'")
        assert sorted(version.tags["expertail.digest"] for version in versions) == sorted(digests)
        assert len(run.outputs.model_outputs) == len(digests)


def until_it_uploads(store, drill):
    """Wait until the server holds points of the run."""

    def reached():
        hurry(drill.folder)
        found = client(store).get_experiment_by_name(drill.experiment)
        found = found and client(store).search_runs([found.experiment_id])
        return bool(found and "train/loss" in found[0].data.metrics)

    runs.wait_until(reached, f"a point of {drill.experiment}", 240)


def test_a_server_that_is_down_at_the_start_gets_everything_once_it_is_there(server, alone, drill):
    server.kill()
    assert drill.train(server.uri, "tracking.final_wait_s=240", events={18: server.begin}) == 0
    check_whole(server, drill)
    alone.check(drill)


@pytest.mark.parametrize("what", ["server", "database"])
def test_what_dies_in_the_middle_and_comes_back_has_every_point_once(what, postgresql, server, alone, drill):
    server.start()
    end, begin = {"server": (server.kill, server.begin), "database": (postgresql.stop, postgresql.start)}[what]

    def die():
        until_it_uploads(server.store, drill)
        end()

    words = ["tracking.final_wait_s=240", "tracking.log_model=false"]
    assert drill.train(server.uri, *words, events={6: die, 18: begin}) == 0
    check_whole(server, drill, models=False)
    alone.check(drill)


def test_a_server_that_is_down_at_the_end_is_named_and_sync_sends_the_rest(server, alone, drill, capsys):
    server.start()

    def kill():
        until_it_uploads(server.store, drill)
        server.kill()

    finished = []
    events = {18: kill, STEPS: lambda: finished.append(time.time())}
    assert drill.train(server.uri, "tracking.final_wait_s=3", events=events) == 0
    waited_s = time.time() - finished[0]
    message = capsys.readouterr().err
    assert f"tracking: {server.uri} does not have all of this run" in message
    assert f"later: expertail sync {drill.folder}\n" in message
    print(f"down at the end: the command ended {waited_s:.1f} s after its last step")
    assert waited_s < 30  # 3 s for the upload, the rest for evaluation, export and table
    alone.check(drill)
    server.start()
    for _ in range(2):
        assert main(["sync", str(drill.folder)]) == 0
    check_whole(server, drill)


def test_a_server_whose_answers_come_late_does_not_slow_training(proxy, server, alone, drill, capsys):
    """Each answer takes 2 s: points that do not fit into the wait at the end are sent later."""
    proxy.rule = lambda method, path, credentials: Fault(delay_s=2.0)

    def asked():
        hurry(drill.folder)
        return proxy.seen

    wait = {6: lambda: runs.wait_until(asked, "a first request", 240)}
    assert drill.train(proxy.uri, "tracking.final_wait_s=20", events=wait) == 0
    message = capsys.readouterr().err
    alone.check(drill)
    assert f"later: expertail sync {drill.folder}" in message
    proxy.rule = lambda method, path, credentials: None
    assert main(["sync", str(drill.folder)]) == 0
    check_whole(server, drill)


@pytest.mark.parametrize("status", [500, 502, 429])
def test_a_server_that_answers_with_errors_for_a_while_has_every_point_once(proxy, server, alone, drill, status):
    """Every request is refused while twelve steps are taken, or until one was."""

    def fail():
        until_it_uploads(server.store, drill)
        proxy.rule = lambda method, path, credentials: Fault(status=status)

    def heal():
        runs.wait_until(lambda: any(fault for *_, fault in proxy.seen), "a refused request", 120)
        proxy.rule = lambda method, path, credentials: None

    words = ["tracking.final_wait_s=240", "tracking.log_model=false"]
    assert drill.train(proxy.uri, *words, events={6: fail, 18: heal}) == 0
    check_whole(server, drill, models=False)
    alone.check(drill)


def test_answers_that_are_lost_after_the_server_did_its_work_double_nothing(proxy, server, alone, drill, capsys):
    """The first answer to every kind of request is lost, and every third of those with points."""
    counts: dict[tuple[str, str], int] = {}
    changing = threading.Lock()

    def lose(method, path, credentials):
        kind = "file" if "mlflow-artifacts" in path else path.rstrip("/").rsplit("/", 1)[-1]
        with changing:
            number = counts[method, kind] = counts.get((method, kind), 0) + 1
        return Fault(lose_answer=True) if number == 1 or (kind == "log-batch" and number % 3 == 0) else None

    def lost_one():
        hurry(drill.folder)
        return counts

    proxy.rule = lose
    wait = {6: lambda: runs.wait_until(lost_one, "a lost answer", 240)}
    assert drill.train(proxy.uri, "tracking.final_wait_s=120", events=wait) == 0
    alone.check(drill)
    if "expertail sync" in capsys.readouterr().err:
        assert main(["sync", str(drill.folder)]) == 0
    lost = {path.rsplit("/", 1)[-1] for _, path, fault in proxy.seen if fault}
    assert {"create", "log-batch", "search"} <= lost
    check_whole(server, drill)


def test_two_runs_at_once_fill_a_fresh_database_through_a_server_and_without_one(postgresql, server, drill):
    """Neither the experiment exists, nor, without a server, the tables."""
    server.start()
    folders = [drill.folder.parent / name for name in ("first", "second")]
    assert runs.train(folders[0]) == 0
    shutil.copytree(folders[0], folders[1])
    expected = noted(folders[0])
    fresh = postgresql.create("fresh")
    code = "import sys; from orchestration.tracking.sender import sync; sys.exit(sync(*sys.argv[1:4], wait_s=240))"
    for uri, store in ((server.uri, server.store), (fresh, fresh)):
        commands = [[sys.executable, "-c", code, str(folder), uri, drill.experiment] for folder in folders]
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        for process in both:
            _, problem = process.communicate(timeout=400)
            assert process.returncode == 0, problem
        for folder in folders:
            run = the_run(store, drill.experiment, folder.name)
            assert held(store, run) == expected
            versions = client(store).search_model_versions(f"run_id = '{run.info.run_id}'")
            assert len(versions) == len({digest for _, digest in tracking_contents.exported_models(folder).values()})


@pytest.mark.parametrize("given", ["uri", "environment"])
def test_the_password_of_the_server_is_used_and_kept_nowhere(proxy, server, drill, capfd, monkeypatch, given):
    """The proxy lets nobody through without it, and fails at first, so that errors are logged too."""
    right = "Basic " + base64.b64encode(f"operator:{PASSWORD}".encode()).decode()
    admitted = []

    def guard(method, path, credentials):
        if credentials != right:
            return Fault(status=401)
        admitted.append(path)
        return Fault(status=503) if len(admitted) <= 3 else None

    proxy.rule = guard
    uri = proxy.uri
    if given == "uri":
        uri = uri.replace("http://", f"http://operator:{PASSWORD}@")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "operator")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setattr(sys, "argv", ["expertail", "train", f"tracking.uri={uri}"])
    assert drill.train(uri, "tracking.final_wait_s=240") == 0
    assert len(admitted) > 3
    assert "503" in (drill.folder / "tracking.log").read_text()
    check_whole(server, drill)
    printed = capfd.readouterr()
    assert PASSWORD not in printed.out + printed.err
    for folder in (drill.folder, server.folder):
        assert not [p for p in folder.rglob("*") if p.is_file() and PASSWORD.encode() in p.read_bytes()]
    run = the_run(server.store, drill.experiment)
    assert PASSWORD not in json.dumps([run.data.params, run.data.tags])
    assert main(["sync", str(drill.folder)]) == (1 if given == "uri" else 0)
    printed = capfd.readouterr().out
    assert given == "environment" or ("401" in printed and "MLFLOW_TRACKING_PASSWORD" in printed)


def test_a_sweep_has_a_parent_for_each_value_and_a_run_that_holds_the_report(server, warm, tmp_path):
    server.start()
    words = [
        "method=dr_h2t", "dataset=digits_lt", "dataset.image_size=8", "engine.threads=1", "run.pictures=false",
        "method.stages.train.batch_size=135", "method.stages.train.epochs=2", "method.stages.h2t.batch_size=135",
        "method.stages.h2t.epochs=1", "method.stages.train.lr_schedule.milestones=[]", f"run.dir={tmp_path}",
        "study.name=x", f"tracking.uri={server.uri}", "tracking.final_wait_s=240", "tracking.log_model=false",
    ]  # fmt: skip
    assert main(["sweep", "method.stages.h2t.flow.ratio=0,0.5", *words]) == 0
    whole = the_run(server.store, "x", "x")
    for row in ("dr_h2t-ratio0", "dr_h2t-ratio0.5"):
        name, parent = f"{row}-s0", the_run(server.store, "x", row)
        child = the_run(server.store, "x", name)
        assert (
            parent.data.metrics == mean_and_spread([headline(tmp_path / "x" / name)])
            and parent.info.status == "FINISHED"
        )
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert held(server.store, child) == noted(tmp_path / "x" / name)
    assert whole.info.status == "FINISHED"
    assert whole.data.tags["axes"] == "method.stages.h2t.flow.ratio=0,0.5"
    names = {file.path for file in client(server.uri).list_artifacts(whole.info.run_id)}
    assert names == {"study.json", "report"}
    assert main(["sync", str(tmp_path / "x")]) == 0
    assert the_run(server.store, "x", "x").info.run_id == whole.info.run_id
