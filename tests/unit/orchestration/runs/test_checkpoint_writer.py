"""The writer of checkpoints: in which order it works, and what a stage sees of it. A fake fleet, no Ray."""

from __future__ import annotations

import json
import os
import threading
from types import SimpleNamespace

import pytest

from orchestration.cluster.failures import WorkerLost
from orchestration.config.compose import load_config
from orchestration.runs import checkpoint_writer
from orchestration.runs.checkpoint_writer import CheckpointWriter
from orchestration.runs.console import Console
from orchestration.runs.run import Run
from orchestration.runs.stage_run import StageRun
from orchestration.runs.stopping import GivenUp, Stopped, StopSignals
from orchestration.storage import checkpoint as checkpoint_module
from orchestration.storage.checkpoint import write_file
from orchestration.storage.journal import Journal
from orchestration.storage.run_folder import RunFolder
from orchestration.training.trainer import Interval

LIMIT_S = 20.0


class FakeFleet:
    """One worker whose files can be held back.

    Attributes:
        events: calls in the order in which they came.
        problem: raised by `write` once it may go on.
    """

    hosts = ({"node": "10.0.0.1", "node_id": "a"},)
    node_ids = ("a",)
    left_out = ()
    shape = SimpleNamespace(workers=1)

    def __init__(self, events):
        self.events, self.problem = events, None
        self.done = 0
        self.may_write, self.writing = threading.Event(), threading.Event()
        self.may_write.set()
        self.in_flight = 0

    def build(self, stage, teachers):
        seen = {"class_names": list("0123456789"), "counts": [9] * 10, "image_shape": [1, 16, 16], "has_val": False} | {
            "remarks": [],
            "files": {},
        }
        return [seen | {"digest": "a" * 64, "steps_per_epoch": 4, "prepares": False}]

    def call(self, method, *args):
        self.events.append(method)
        return [None if "memory" in method else getattr(self, method)(*args)]

    def train(self, until):
        losses, self.done = [1.0] * (until - self.done), until
        return Interval(losses=losses, images=len(losses), seconds=0.1)

    def snapshot(self):
        return {"step": self.done, "sums": {}}

    def write(self, folder):
        self.in_flight += 1
        assert self.in_flight == 1, "two writes at once"
        self.writing.set()
        assert self.may_write.wait(LIMIT_S)
        self.in_flight -= 1
        if self.problem is not None:
            raise self.problem
        return [write_file(checkpoint_module.Path(folder), "trunk.safetensors", b"weights")], {}


@pytest.fixture
def events():
    return []


@pytest.fixture
def fleet(events):
    fleet = FakeFleet(events)
    yield fleet
    fleet.may_write.set()


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    words = ["method=ce", "dataset.root=/data", "run.max_steps=3"]
    words += ["run.checkpoint_every_steps=1", "run.keep_checkpoints=1"]
    run = Run(load_config(words), folder, Console(stream=None), StopSignals(), {})
    run.leaving_nodes = SimpleNamespace(own_node="driver", among=lambda nodes: [])
    with run.journal:
        yield run
    folder.close()


@pytest.fixture
def stage(run, fleet):
    stage = StageRun(run, "train", fleet, run.console)
    stage.prepare()
    return stage


def state(step, best=None):
    return {"stage": "train", "total_steps": 9, "step": step, "sums": {}, "best": best, "last": None}


def best_at(step):
    return {"step": step, "value": 0.5, "checkpoint": f"best-00-train-{step:08d}", "evaluation": {}}


def leave(writer, problem, saved=None, meanwhile=lambda writer: None):
    """Leave the context of a writer with a problem while a write is in flight."""
    with writer:
        writer.start(saved or state(4))
        meanwhile(writer)
        raise problem


def names(run):
    return sorted(path.name for path in run.checkpoints.folder.iterdir())


def test_a_checkpoint_is_made_in_the_order_that_is_promised(run, fleet, events, monkeypatch):
    """Journal on disk before the final name, best weights from a complete checkpoint, removals and news last."""
    syncing, renaming = os.fsync, os.rename

    def fsync(handle):
        name = os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2]
        if name in ("metrics.jsonl", "manifest.json"):
            events.append(f"{name} on disk")
        syncing(handle)

    def rename(source, target):
        events.append(f"named {target.name}")
        renaming(source, target)

    def removed(folder, **_):
        events.append(f"removed {folder.name}")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", removed)
    monkeypatch.setattr(run.cost, "write", lambda: events.append("cost"))
    monkeypatch.setattr(run.folder, "announce_checkpoint", lambda: events.append("announced"))
    writer = CheckpointWriter(run, "train", fleet)
    with writer:
        writer.start(state(4, best_at(4)))
        writer.wait()
        events.clear()
        writer.start(state(8, best_at(8)))
    steps = [event for event in events if ".replaced" not in event]
    assert steps == [
        "metrics.jsonl on disk",
        "write",
        "manifest.json on disk",
        "named 00-train-00000008",
        "manifest.json on disk",
        "named best-00-train-00000008",
        "removed 00-train-00000004",
        "removed best-00-train-00000004",
        "cost",
        "announced",
    ]
    assert writer.newest == run.checkpoints.folder / "00-train-00000008"


def test_lines_before_a_checkpoint_are_in_the_journal_before_its_write_begins(run, fleet):
    fleet.may_write.clear()
    run.journal.append("train", 1, 4, {"train/loss": 1.0})
    with CheckpointWriter(run, "train", fleet) as writer:
        writer.start(state(4))
        assert '"step": 4' in run.journal.path.read_text()
        fleet.may_write.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(stage, fleet, events, run):
    """The fleet itself refuses a second write at once."""
    fleet.may_write.clear()
    stage.take(1)
    assert fleet.writing.wait(LIMIT_S)
    assert names(run)[0].startswith(".writing-"), "no checkpoint yet"
    assert stage.step == 1 and stage.checkpoint is None

    going_on = threading.Thread(target=stage.take, args=(2,))  # its first step ends at a checkpoint again
    going_on.start()
    while events.count("train") < 2:
        assert going_on.is_alive()
    assert events.count("snapshot") == 1, "the copy is still being written"
    fleet.may_write.set()
    going_on.join(LIMIT_S)
    stage._writer.wait()
    assert stage.checkpoint is not None and stage.checkpoint.name == "00-train-00000003"
    assert events.count("write") == events.count("snapshot") == 3


def test_an_error_of_a_write_surfaces_once_at_the_next_interval(stage, fleet):
    full = OSError(28, "No space left on device", "/run")
    fleet.problem = full
    stage.take(1)
    stage._writer._thread.join(LIMIT_S)
    with pytest.raises(OSError, match="No space left on device") as raised:
        stage.take(1)
    assert raised.value is full and stage.step == 1
    fleet.problem = None
    stage.take(1)
    stage._writer.wait()
    assert stage.checkpoint.name == "00-train-00000002"


@pytest.mark.parametrize("ending", [Stopped, GivenUp])
def test_a_stage_that_is_to_end_says_so_after_its_checkpoint_is_there(ending, stage, fleet, run):
    fleet.may_write.clear()
    if ending is Stopped:
        run.signals.received = 15
    else:
        run.signals.given_up.set()
    threading.Timer(0.2, fleet.may_write.set).start()
    with pytest.raises(ending), stage._writer:
        stage.take(1)
    assert names(run) == ["00-train-00000001"]


def test_a_full_disk_comes_before_the_stop_that_it_prevents(stage, fleet, run):
    fleet.problem = OSError(28, "No space left on device")
    run.signals.received = 15
    with pytest.raises(OSError, match="No space left"), stage._writer:
        stage.take(1)


def test_a_stage_ends_with_its_last_checkpoint_complete(stage, fleet, run, monkeypatch):
    monkeypatch.setattr(StageRun, "_evaluate", evaluated)
    outcome = stage.carry_out()
    assert outcome.checkpoint == run.checkpoints.folder / "00-train-00000003"
    assert json.loads((outcome.checkpoint / "state.json").read_text())["last"]["step"] == 3
    assert stage._writer._thread is None


def evaluated(stage, *, count):
    stage.last = {"step": stage.step, "evaluation": {"split": "test"}}


def test_a_lost_worker_is_one_failure_though_its_files_fail_too(run, fleet):
    fleet.problem = WorkerLost("a worker died: its files")
    with pytest.raises(WorkerLost, match="in training"):
        leave(CheckpointWriter(run, "train", fleet), WorkerLost("a worker died: in training"))


def test_a_checkpoint_whose_files_come_soon_after_the_loss_counts(run, fleet):
    fleet.may_write.clear()
    threading.Timer(0.2, fleet.may_write.set).start()
    with pytest.raises(WorkerLost):
        leave(CheckpointWriter(run, "train", fleet), WorkerLost("a worker died"))
    assert run.checkpoints.newest("train", pytest.fail).state["step"] == 4


@pytest.mark.parametrize("problem", [WorkerLost("a worker hangs", "hang"), KeyboardInterrupt()], ids=["loss", "Ctrl-C"])
def test_no_checkpoint_appears_after_a_stage_was_left(problem, run, fleet, monkeypatch):
    """Else a restart could go on from one checkpoint while another one becomes the newest."""
    monkeypatch.setattr(checkpoint_writer, "_LAST_FILES_S", 0.05)
    fleet.may_write.clear()
    threads = []
    with pytest.raises(type(problem)):
        leave(CheckpointWriter(run, "train", fleet), problem, meanwhile=lambda writer: threads.append(writer._thread))
    assert threads[0].is_alive()
    fleet.may_write.set()
    threads[0].join(LIMIT_S)
    assert not threads[0].is_alive()
    assert run.checkpoints.newest("train", pytest.fail) is None


def test_a_checkpoint_that_has_its_name_is_finished_after_a_loss(run, fleet, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_LAST_FILES_S", 0.05)
    named, go_on = threading.Event(), threading.Event()
    keep = CheckpointWriter._keep_best

    def slowly(writer, folder, state):
        named.set()
        assert go_on.wait(LIMIT_S)
        keep(writer, folder, state)

    def until_named(writer):
        assert named.wait(LIMIT_S)
        threading.Timer(0.3, go_on.set).start()

    monkeypatch.setattr(CheckpointWriter, "_keep_best", slowly)
    with pytest.raises(WorkerLost):
        leave(CheckpointWriter(run, "train", fleet), WorkerLost("a worker died"), state(4, best_at(4)), until_named)
    assert names(run) == ["00-train-00000004", "best-00-train-00000004"]


def test_an_error_of_a_write_comes_before_a_later_refusal(run, fleet):
    """The disk was full first; the refusal is its cause in the trace."""
    fleet.problem = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left") as raised:
        leave(CheckpointWriter(run, "train", fleet), FloatingPointError("the loss is not finite"))
    assert isinstance(raised.value.__cause__, FloatingPointError)


def test_a_refusal_says_more_than_the_files_that_fail_with_it(run, fleet):
    fleet.problem = WorkerLost("a worker died")
    with pytest.raises(FloatingPointError):
        leave(CheckpointWriter(run, "train", fleet), FloatingPointError("the loss is not finite"))


def test_workers_that_were_ended_meanwhile_leave_no_checkpoint(run, fleet):
    """A second Ctrl-C ends the workers of all stages; a call to none of them returns no answers."""
    fleet.call = lambda method, *args: []
    with pytest.raises(WorkerLost, match="ended before"), CheckpointWriter(run, "train", fleet) as writer:
        writer.start(state(4))
    assert run.checkpoints.newest("train", pytest.fail) is None


def test_a_journal_reaches_the_disk_while_lines_are_added_and_while_it_is_rewound(tmp_path, monkeypatch):
    """`sync` holds neither the lock nor the file that `rewind` closes."""
    syncing, lines = os.fsync, []

    def fsync(handle):
        if threading.current_thread() is not threading.main_thread():
            journal.append("train", 1, 2, {"train/loss": 1.0})
            other = threading.Thread(target=journal.rewind, args=({"train": 1}, ["train"]))
            other.start()
            other.join(LIMIT_S)
            lines.append(journal.path.read_text())
        syncing(handle)

    with Journal(tmp_path) as journal:
        journal.append("train", 1, 1, {"train/loss": 1.0})
        journal.flush()
        thread = threading.Thread(target=journal.sync)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: fsync(handle) if threading.current_thread() is thread else None)
            thread.start()
            thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert lines[0].count("\n") == 1
