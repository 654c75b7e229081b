"""The uploader's process, without a server: the journal's tail, its state, its lock, and what failures do to it."""

from __future__ import annotations

import json
import threading

import pytest

from orchestration.storage.files import write_atomic
from orchestration.storage.journal import Journal
from orchestration.tracking.process import (
    JournalTail,
    RedactedStream,
    State,
    Target,
    flush,
    follow,
    hold_lock,
    incomplete_message,
    is_permanent,
)


def test_the_tail_follows_a_growing_and_a_rewound_journal(tmp_path):
    journal = Journal(tmp_path, flush_s=0)
    tail = JournalTail(journal.path)
    seen = []
    for step in (1, 2, 3):
        journal.append("train", 1, step, {"train/loss": 0.0})
        seen += [record.step for record in tail.records()]
    assert seen == [1, 2, 3]
    journal.rewind({"train": 1}, ["train"])
    journal.append("train", 1, 2, {"train/loss": 0.0})
    assert [record.step for record in tail.records()] == [1, 2]
    with open(journal.path, "ab") as file:
        file.write(b'{"time": 1, "stage": "tr')
    assert list(tail.records()) == []
    journal.close()


def test_a_tail_of_a_journal_that_is_not_there_yet_waits(tmp_path):
    assert list(JournalTail(tmp_path / "metrics.jsonl").records()) == []


def test_the_state_keeps_stores_apart_and_no_secret(tmp_path):
    one = State(tmp_path, Target("http://me:s3cret@h", "e", "r"))
    one.values["run_id"] = "x"
    one.save()
    text = (tmp_path / "tracking.json").read_text()
    assert "s3cret" not in text
    assert State(tmp_path, Target("http://other@h", "e", "r")).values["run_id"] == "x"
    elsewhere = State(tmp_path, Target("http://elsewhere", "e", "r")).values
    assert "run_id" not in elsewhere
    assert elsewhere["key"] == one.values["key"]  # the same store by another name finds the same run
    assert [path.name for path in tmp_path.iterdir()] == ["tracking.json"]


def test_two_processes_that_see_a_folder_first_agree_on_its_key(tmp_path):
    """Runs side by side create their study's MLflow run once."""
    one, two = (State(tmp_path, Target("http://h", "e", "r")) for _ in range(2))
    assert one.values["key"] != two.values["key"]
    one.agree_on_key()
    one.values["run_id"] = "x"
    one.save()
    two.agree_on_key()
    assert (two.values["key"], two.values["run_id"]) == (one.values["key"], "x")


def test_library_output_is_logged_without_secrets(tmp_path):
    with open(tmp_path / "log", "w") as file:
        print("Traceback: http://me:s3cret@h/api", file=RedactedStream(file))
    assert (tmp_path / "log").read_text() == "Traceback: http://h/api\n"


@pytest.mark.parametrize(
    ("uri", "problem", "hint"),
    [("http://h", "down", False), ("http://me:s3cret@h", "down", True), ("http://h", "error code 401 != 200", True)],
)
def test_an_operator_whose_server_needs_a_password_reads_where_to_put_it(tmp_path, uri, problem, hint):
    text = incomplete_message(tmp_path, uri, problem)
    assert ("MLFLOW_TRACKING_PASSWORD" in text) == hint
    assert "s3cret" not in text and "\n" not in text
    assert f"expertail sync {tmp_path}" in text


def test_a_lock_is_held_by_one(tmp_path):
    with hold_lock(tmp_path / "lock", wait_s=0) as first, hold_lock(tmp_path / "lock", wait_s=0) as second:
        assert (first, second) == (True, False)
    with hold_lock(tmp_path / "lock", wait_s=0) as again:
        assert again


class Refusal(Exception):
    def __init__(self, status):
        self.status = status

    def __str__(self):
        return str(self.status)

    def get_http_status_code(self):
        return self.status


@pytest.mark.parametrize(
    ("error", "final"),
    [(Refusal(400), True), (Refusal(403), True), (Refusal(429), False), (Refusal(500), False), (OSError(), False),
     (ValueError(), True), (RuntimeError("Detected out-of-date database schema (found version 1)"), True)],
)  # fmt: skip
def test_a_permanent_error_is_not_tried_again(error, final):
    assert is_permanent(error) == final


class Flaky:
    """A sender whose server fails a few times."""

    has_run = True

    def __init__(self, folder, errors):
        self.state = State(folder, Target("http://h", "e", "r"))
        self.errors = errors
        self.calls = []

    def connect(self):
        self.calls.append("connect")
        if self.errors:
            raise self.errors.pop(0)

    def describe(self):
        self.calls.append("describe")

    def send_points(self, deadline):
        return True

    def send_system(self): ...

    def send_files(self):
        self.calls.append("files")

    def send_models(self):
        self.calls.append("models")

    def close(self, status):
        self.calls.append(status)


def test_what_does_not_pass_is_reported_once_and_what_may_pass_at_the_third_time(tmp_path, monkeypatch):
    """403 is permanent; a server that is down may come back."""
    monkeypatch.setattr("orchestration.tracking.process.set_priority", lambda nice: None)  # of all tests
    reports, wake = [], threading.Event()
    wake.wait = lambda seconds: reports.append("pause")
    down = OSError("down")
    sender = Flaky(tmp_path, [down, down, Refusal(403), Refusal(403), down, down])
    sender.describe = wake.set
    follow(sender, wake, report=reports.append)
    pause = ["pause"]
    assert reports == [*pause * 2, "Refusal: 403", *pause * 2, "OSError: down", *pause * 3]


@pytest.mark.slow
def test_flushing_goes_on_past_failures_and_remembers_what_is_wrong(tmp_path):
    sender = Flaky(tmp_path, [OSError("down")])
    assert flush(sender, 10, "FINISHED") is None
    assert sender.calls == ["connect", "connect", "describe", "files", "models", "FINISHED"]
    assert flush(Flaky(tmp_path, [OSError("down http://u:s3cret@h")] * 99), 0.6, None) == "OSError: down http://h"
    assert "OSError: down http://h" in (tmp_path / "tracking.json").read_text()
    assert flush(Flaky(tmp_path, [Refusal(403)]), 100, None).startswith("Refusal")
    assert json.loads((tmp_path / "tracking.json").read_text())["http://h"]["status"] == "FINISHED"


def test_how_a_run_ended_is_what_was_reported_last_until_its_folder_says_otherwise(tmp_path):
    """A driver was killed, which only its uploader could report; the run went on without tracking and is finished."""
    (tmp_path / "run.json").write_text('{"status": "running"}')
    assert flush(Flaky(tmp_path, []), 1, "KILLED") is None

    def synced():
        sender = Flaky(tmp_path, [])
        assert flush(sender, 1, None) is None
        return sender.calls[-1]

    assert synced() == synced() == "KILLED"
    write_atomic(tmp_path / "run.json", '{"status": "finished"}')
    assert synced() is None, "as the folder says"


def test_a_study_that_was_interrupted_and_went_on_is_not_called_killed(tmp_path):
    write_atomic(tmp_path / "study.json", "{}")
    assert flush(Flaky(tmp_path, []), 1, "KILLED") is None
    write_atomic(tmp_path / "study.json", "{}")
    sender = Flaky(tmp_path, [])
    assert flush(sender, 1, None) is None and sender.calls[-1] is None
