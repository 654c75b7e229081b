"""Tracking against real MLflow stores: a SQLite file, and a server on the loopback interface."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestration.cli import main
from orchestration.storage.journal import Journal
from orchestration.tracking.ownership import settle_ownership
from orchestration.tracking.process import Target, flush
from orchestration.tracking.registry import set_alias
from orchestration.tracking.sender import MlflowSender, sync
from orchestration.tracking.uploader import start_uploader
from orchestration.tracking.uri import default_uri
from tests.mlflow_server import hurry

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
COUNTS = [200, 50, 5]


def make_run(folder, steps=10, finished=True):
    """Write a run folder as training leaves it, without models."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "method: {name: ride, stages: {train: {epochs: 2}}}\ndataset: {name: tiny}\nseed: 4\n"
        "tracking: {uri: 'http://me:s3cret@host'}\n"
    )
    run = {"command": "expertail train", "commit": "abc", "seed": 4, "versions": {"torch": "2"}, "host": {"name": "h"}}
    run |= {"parameters": ["seed", "method.name", "method.stages.train.epochs"]}
    run |= {"created": "2026-01-02T03:04:05Z", "ended": 1767323105.5} if finished else {}
    (folder / "run.json").write_text(json.dumps({**run, "status": "finished" if finished else "running"}))
    groups = {"by_count": {"many": [0], "medium": [1], "few": [2]}, "by_index": None}
    data = {"dataset": "tiny", "class_names": ["a", "b", "c"], "counts": COUNTS, "total": 255, "digest": "d" * 64}
    (folder / "data.json").write_text(json.dumps({**data, "groups": groups, "image_shape": [8, 8, 1]}))
    member = {"top1": {"all": 0.5}, "nll": 1.0, "ece": 0.1, "per_class": [1.0, 0.5, None]}
    result = {"split": "test", "selected_on": "test", "stage": "train", "epoch": 2, "step": steps, "num_images": 9}
    (folder / "evaluation").mkdir()
    for which in ("last", "best"):
        (folder / f"evaluation/{which}.json").write_text(json.dumps({**result, "members": {"ensemble": member}}))
    (folder / "report").mkdir()
    (folder / "report" / "curves.png").write_bytes(b"png")
    (folder / "report" / "table.txt").write_text("all 50.00\n")
    append(folder, range(1, steps + 1), 1e9)
    return folder


def append(folder, steps, start):
    with Journal(folder) as journal:
        for step in steps:
            journal.append("train", 1, step, {"train/loss": 1 / step, "train/lr": 0.1}, time=start + step)


def add_models(folder):
    """Export two different ensembles as training does."""
    import torch

    from aggregation.aggregator import MeanLogits
    from aggregation.serving import TrainingData, export_model
    from experts.backbones.resnet_cifar import ResNetCifar
    from experts.data.config import DatasetConfig
    from experts.ensemble import EnsembleConfig, build_ensemble
    from experts.heads.cosine import CosineHead

    torch.set_num_threads(1)
    backbone, head, names = ResNetCifar.Config(depth=8), CosineHead.Config(), ("expert0", "expert1")
    config = EnsembleConfig(backbone, head, num_classes=3, expert_names=names, reduce_dimension=False)
    dataset = DatasetConfig(name="tiny", source="digits")
    data = TrainingData(dataset=dataset, class_names=("a", "b", "c"), counts=COUNTS, image_shape=(8, 8, 1))
    for seed, which in enumerate(("last", "best")):
        state = build_ensemble(config, seed=seed).state_dict()
        export_model(folder / "export" / which, state, config, MeanLogits.Config(), data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make a folder of runs with one SQLite store, once: its tables take seconds."""
    return tmp_path_factory.mktemp("runs")


def client(uri):
    import mlflow

    return mlflow.MlflowClient(uri, uri)


def the_run(uri, name, experiment="expertail"):
    """Return the MLflow run of that name: there must be exactly one."""
    experiment = client(uri).get_experiment_by_name(experiment).experiment_id
    (run,) = client(uri).search_runs([experiment], f"attributes.run_name = '{name}'")
    return run


def history(uri, name, experiment="expertail"):
    points = client(uri).get_metric_history(the_run(uri, name, experiment).info.run_id, "train/loss")
    return sorted((point.step, point.value, point.timestamp) for point in points)


def expected(steps, start=1e9):
    return [(step, 1 / step, round((start + step) * 1000)) for step in steps]


@pytest.fixture(scope="module")
def whole(runs):
    """Write a finished run with models."""
    folder = make_run(runs / "whole")
    add_models(folder)
    return folder


def test_mlflow_holds_what_the_run_folder_holds_and_nothing_twice(runs, whole):
    uri, folder = default_uri(runs), whole
    for _ in range(2):
        assert sync(folder, uri) is None
        run = the_run(uri, "whole")
        assert history(uri, "whole") == expected(range(1, 11))
        assert run.info.status == "FINISHED"
        assert (run.info.start_time, run.info.end_time) == (1767323045000, 1767323105500)  # of training, not of sending
        assert run.data.tags["mlflow.note.content"] == "```\nall 50.00\n```"
        assert run.data.params == {"seed": "4", "method.name": "ride", "method.stages.train.epochs": "2"}
        assert (run.data.metrics["final/all"], run.info.run_name) == (50.0, "whole")
        assert run.data.tags["dataset_digest"] == "d" * 64
        assert run.data.tags["mlflow.source.git.commit"] == "abc"
        assert len(run.inputs.dataset_inputs) == 1
        versions = client(uri).search_model_versions("name = 'expertail-tiny'")
        assert len(versions) == 2
        assert len(run.outputs.model_outputs) == 2
    names = {file.path for file in client(uri).list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "run.json", "data.json", "evaluation", "report", "per_class.json"}
    table = client(uri).load_table(run.info.experiment_id, "per_class.json", [run.info.run_id])
    assert table["last/ensemble"].tolist()[:2] == [1.0, 0.5]
    stored = [path for path in runs.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert stored == [folder / "config.yaml"]


@pytest.mark.drill
def test_the_registered_model_predicts_where_the_project_is_not_installed(runs, whole, tmp_path):
    from aggregation.serving import load_model

    uri, folder = default_uri(runs), whole
    assert sync(folder, uri) is None
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    script = f"""
import sys
sys.path = [p for p in sys.path if p != {str(ROOT)!r}]
import mlflow, numpy as np
mlflow.set_tracking_uri({uri!r})
images = np.load("images.npy")
for version in mlflow.MlflowClient().search_model_versions("name = 'expertail-tiny'"):
    place = f"models:/{{version.name}}/{{version.version}}"
    answers = mlflow.pyfunc.load_model(place).predict(images, params={{"top": 3}})
    found = [{{one["class"]: one["probability"] for one in answer["top"]}} for answer in answers]
    np.save(version.tags["model"], [[one[c] for c in "abc"] for one in found])
assert not {{"experts", "aggregation", "orchestration"}} & sys.modules.keys()
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    for which in ("last", "best"):
        probabilities = np.load(tmp_path / f"{which}.npy")
        np.testing.assert_allclose(probabilities, load_model(folder / "export" / which).predict(images), rtol=1e-5)
    assert not list((runs / "mlartifacts").rglob("*.pkl"))


def test_an_alias_is_asked_for_and_not_taken_by_a_run_that_ends_later(runs, whole, tmp_path, monkeypatch, capsys):
    uri, name = default_uri(runs), "expertail-tiny"
    with pytest.raises(
        ValueError, match=r"later: best is not in sqlite.*: it has no model of the run; .*expertail sync"
    ):
        set_alias(runs / "later", uri, "expertail", "best", "best")
    assert sync(whole, uri) is None
    assert "best of whole (new)" in set_alias(whole, uri, "expertail", "best", "best")
    first = client(uri).get_model_version_by_alias(name, "best")
    assert (first.tags["run"], first.tags["model"]) == ("whole", "best")

    later = make_run(runs / "later")
    add_models(later)
    assert sync(later, uri) is None
    assert client(uri).get_model_version_by_alias(name, "best").version == first.version
    Image.new("L", (8, 8), 99).save(tmp_path / "a.png")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    answers = []
    for model in (f"models:/{name}@best", f"models:/{name}/{first.version}", f"runs:/{first.run_id}/best", whole):
        assert main(["predict", str(model), str(tmp_path / "a.png"), "--csv", "-"]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    moved = set_alias(later, uri, "expertail", "best", "best")
    assert moved.endswith(f"best of later (before: version {first.version})")
    assert client(uri).get_model_version_by_alias(name, "best").tags["run"] == "later"
    with pytest.raises(ValueError, match="alias latest is as it was"):
        set_alias(later, uri, "expertail", "best", "latest")


def test_a_killed_and_resumed_run_has_every_point_once(runs):
    """The uploader sees 10 steps and dies; the run goes back to step 6 and on to 12, at later times."""
    uri, folder = default_uri(runs), make_run(runs / "resumed")
    assert flush(MlflowSender(folder, Target(uri, "expertail", "resumed")), 60, "KILLED") is None
    with Journal(folder) as journal:
        journal.rewind({"train": 6}, ["train"])
    append(folder, range(7, 13), 2e9)
    assert flush(MlflowSender(folder, Target(uri, "expertail", "resumed")), 60, "FINISHED") is None
    assert history(uri, "resumed") == expected(range(1, 11)) + expected([11, 12], 2e9)


def test_a_lost_answer_and_a_lost_memory_double_nothing(runs):
    """The server takes a batch, the answer is lost, then the uploader dies before it has saved its run."""
    uri, folder = default_uri(runs), make_run(runs / "lost")
    sender = MlflowSender(folder, Target(uri, "expertail", "lost"))
    sender.connect()
    send = sender._client.log_batch
    lost = []

    def lose_the_answer(*args, metrics=(), **kwargs):
        send(*args, metrics=metrics, **kwargs)
        if metrics and len(metrics) not in lost:
            lost.append(len(metrics))
            raise OSError("connection reset")

    sender._client.log_batch = lose_the_answer
    assert flush(sender, 60, "FINISHED") is None
    assert lost == [1, 20], "its accuracy, and its journal"
    state = json.loads((folder / "tracking.json").read_text())
    for store in state.values():
        (store.pop("run_id"), store.pop("experiment_id"))
    (folder / "tracking.json").write_text(json.dumps(state))
    assert sync(folder, uri) is None
    assert history(uri, "lost") == expected(range(1, 11))


def test_a_copied_folder_gets_a_run_of_its_own_and_a_moved_one_goes_on_with_it(runs):
    """Both folders train on after the copy: neither writes to the other's run."""
    uri, folder = default_uri(runs), make_run(runs / "origin")
    settle_ownership(folder)
    assert sync(folder, uri) is None
    origin = the_run(uri, "origin").info.run_id
    copy = shutil.copytree(folder, runs / "copy")
    append(copy, range(11, 13), 2e9)
    settle_ownership(copy)
    assert sync(copy, uri) is None
    assert history(uri, "origin") == expected(range(1, 11))
    assert history(uri, "copy") == expected(range(1, 11)) + expected([11, 12], 2e9)
    assert the_run(uri, "copy").data.tags["expertail.copied_from.run"] == origin
    moved = shutil.move(folder, runs / "moved")
    append(moved, range(11, 12), 3e9)
    settle_ownership(moved)
    assert sync(moved, uri) is None
    assert history(uri, "origin") == expected(range(1, 11)) + expected([11], 3e9)


@pytest.mark.drill
def test_uploaders_share_a_new_file_and_end_with_their_drivers(tmp_path):
    """Two at once on a store that does not exist yet: one driver finishes, the other is killed with SIGKILL."""
    uri = default_uri(tmp_path)
    code = (
        "import sys, time\nfrom orchestration.tracking.uploader import start_uploader\n"
        "uploader = start_uploader(sys.argv[1], sys.argv[2])\nprint(uploader._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    orphan = make_run(tmp_path / "orphan", steps=300, finished=False)
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(orphan), uri], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    folder = make_run(tmp_path / "done", steps=300)
    started = time.monotonic()
    uploader = start_uploader(folder, uri)
    assert time.monotonic() - started < 1.0
    pid = int(driver.stdout.readline())
    append(folder, range(301, 401), 1e9)
    assert uploader.finish(120) is None
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60)
    assert history(uri, "done") == expected(range(1, 401))
    assert the_run(uri, "done").info.status == "FINISHED"
    assert history(uri, "orphan") == expected(range(1, 301))
    assert the_run(uri, "orphan").info.status == "KILLED"


@pytest.mark.drill
def test_a_server_that_is_not_there_costs_nothing_but_a_message_and_is_caught_up_with(runs, tmp_path):
    """First nobody answers; then a real server does, and gets everything, the model too."""
    port = free_port()
    uri = f"http://me:s3cret@127.0.0.1:{port}"
    folder = make_run(tmp_path / "late")
    uploader = start_uploader(folder, uri, "served")

    def has_tried():
        hurry(folder)
        return "failure 1" in (folder / "tracking.log").read_text()

    wait_until(has_tried, 60)
    started = time.monotonic()
    problem = uploader.finish(2)
    assert time.monotonic() - started < 6
    assert f"expertail sync {folder}" in problem
    assert "\n" not in problem
    for text in (problem, (folder / "tracking.log").read_text(), (folder / "tracking.json").read_text()):
        assert "s3cret" not in text
    add_models(folder)
    shutil.rmtree(folder / "export" / "best")
    (tmp_path / "server").mkdir()
    if (runs / "mlflow.db").exists():
        shutil.copy(runs / "mlflow.db", tmp_path / "server" / "db")  # tables that are there already save seconds
    with server(tmp_path / "server", port):
        assert sync(folder, uri, "served") is None
        assert sync(folder, uri, "served") is None
        assert history(uri, "late", "served") == expected(range(1, 11))
        assert the_run(uri, "late", "served").info.status == "FINISHED"
        (version,) = client(uri).search_model_versions(f"run_id = '{the_run(uri, 'late', 'served').info.run_id}'")
        assert (version.name, version.tags["model"]) == ("served-tiny", "last")


class server:
    """Start `mlflow server` on the loopback interface, serving artefacts too."""

    def __init__(self, folder, port):
        self.port = port
        self.log = open(folder / "log", "wb")  # noqa: SIM115
        self.command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", str(folder / "artifacts"),
        ]  # fmt: skip

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=self.log, start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        wait_until(self.answers, 120)

    def answers(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, limit_s):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
