"""A lane keeps the outcome of a run and tells its parent, whatever happens to the files of the run."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading

import pytest

from orchestration.commands import lane
from orchestration.commands.lane import LOG_FILE, _output_to, _problem

URI = "http://me:s3cret@host:5000"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_problem_is_told_and_kept_without_a_password(kind, tmp_path, capfd):
    with capfd.disabled(), _output_to(tmp_path / LOG_FILE):
        try:
            raise kind(f"tracking.uri={URI}: 1 problem")
        except kind as problem:
            outcome = _problem(problem)
    said = (tmp_path / LOG_FILE).read_text()
    assert "http://host:5000: 1 problem" in said and "s3cret" not in said
    assert "http://host:5000: 1 problem" in outcome["problem"] and "s3cret" not in outcome["problem"]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Return how a run ends whose training is pretended; its text goes to standard output as in a lane."""
    told = []

    class Parent:
        say = staticmethod(lambda event, **_: told.append(event))

    def start(folder, pretend):
        monkeypatch.setattr(lane, "_carry_out", lambda job, folder: pretend())
        for name, number in (("stdout", 1), ("stderr", 2)):
            monkeypatch.setattr(sys, name, os.fdopen(number, "w", closefd=False))
        return lane._train({"run": "a", "folder": str(folder), "words": []}, Parent), told

    yield start
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def test_a_run_whose_text_cannot_be_written_fails_by_itself_and_says_which_file(train, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "a" / "console.log").mkdir(parents=True)
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "a", "Is a directory")):
        outcome, told = train(folder, lambda: 0)
        assert outcome["status"] == "failed" and not outcome["no_room"] and told == []
        assert outcome["problem"].startswith(f"{folder}/console.log: the run's text cannot be written ({why}); make")


def test_a_full_disk_costs_neither_the_outcome_of_a_run_nor_the_output_of_the_lane(train, tmp_path):
    """/dev/full takes no byte, as a file on a full disk."""
    (tmp_path / "console.log").symlink_to("/dev/full")
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    before = os.fstat(1), os.fstat(2)

    def finish():
        sys.stdout.write("epoch 1")
        return 0

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    assert train(tmp_path, finish)[0] == {"status": "finished", "exit": 0, "problem": None}
    outcome, told = train(tmp_path, fail)
    assert outcome["status"] == "failed" and outcome["no_room"] and told == ["began", "began"]
    assert (os.fstat(1), os.fstat(2)) == before


@pytest.mark.parametrize(("lines", "sent"), [(['{"ray": "a:1"}', '{"run": "a"}'], [signal.SIGTERM]), (["{}"], [])])
def test_a_run_that_was_sent_is_stopped_when_the_parent_goes_before_it_begins(lines, sent, monkeypatch):
    signals, ended = [], threading.Event()
    monkeypatch.setattr(sys, "stdin", iter(lines))
    monkeypatch.setattr(lane, "_RAY_GONE", 0)
    monkeypatch.setattr(os, "kill", lambda _, number: signals.append(number))
    monkeypatch.setattr(os, "_exit", lambda _: ended.set())
    reads, writes = os.pipe()
    parent = lane._Parent(writes)
    assert ended.wait(10) and signals == sent
    assert list(parent.jobs()) == [json.loads(line) for line in lines]
    os.close(reads)
    os.close(writes)
