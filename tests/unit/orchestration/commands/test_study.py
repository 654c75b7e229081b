"""`expertail study` around its runs, which are only pretended here: its exit code, its end, its reports."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from orchestration.commands import study as command
from orchestration.studies.run_queue import FAILED, FINISHED


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Return a start of a study without Ray, lanes and reports; its runs end as they are told to."""
    for name in ("cluster", "_lanes"):
        monkeypatch.setattr(command, name, lambda *_: nullcontext(command.Lanes([], tmp_path, {})))
    monkeypatch.setattr(command, "node_resources", dict)
    for name in ("_evaluate", "_report"):
        monkeypatch.setattr(command, name, lambda _: None)

    def start(train, *words):
        def pretend(grid, folder, points, lanes, lent):
            for point in points:
                folder.update(point.run, status=train(point.run))

        monkeypatch.setattr(command, "_train", pretend)
        common = ["method=ce", "dataset=digits_lt", f"run.dir={tmp_path}", "study.name=x", "tracking.enabled=false"]
        return command.study([*common, *words])

    return start


def test_the_exit_code_is_that_of_the_runs_that_were_asked_for(pretended, capsys):
    assert pretended(lambda run: FAILED if run == "ce-s1" else FINISHED, "seed=0,1") == 1
    assert "failed: ce-s1; study.retry=failed trains them again" in capsys.readouterr().err
    assert pretended(lambda _: FINISHED, "seed=0") == 0
    assert "trains them again" not in capsys.readouterr().err


def test_a_study_that_cannot_go_on_shows_how_its_runs_stand_and_ends_its_upload(pretended, monkeypatch, capsys):
    waits = list[float]()

    def full(run):
        if run == "ce-s1":
            raise ValueError("no run begins any more: No space left on device")
        return FINISHED

    monkeypatch.setattr(command, "_upload", lambda *_: SimpleNamespace(finish=waits.append))
    with pytest.raises(ValueError, match="no run begins any more"):
        pretended(full, "seed=0,1")
    assert waits == [command._STOPPED_WAIT_S]
    assert "x: 2 runs; 1 gone, 1 waiting" in capsys.readouterr().out


def test_the_report_follows_runs_that_end_and_a_failure_to_start_it_ends_nothing(monkeypatch, tmp_path):
    """A run ends a minute after a report: the next is written nine minutes later, though no other run has ended."""
    clock, started = [0.0], []

    def start(*_, **__):
        started.append(clock[0])
        if len(started) == 1:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return SimpleNamespace(poll=lambda: 0)

    class Runs:
        def __init__(self, *arguments):
            self.ended, self.looked = arguments[7], arguments[9]

        def carry_out(self):
            for minute in range(60):
                clock[0] = 60.0 * minute
                if minute in (1, 21):
                    self.ended()
                self.looked("")

    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(command.subprocess, "Popen", start)
    monkeypatch.setattr(command, "SideBySide", Runs)
    monkeypatch.setattr(command, "own_address", str)
    point = SimpleNamespace(run="a")
    record = {"status": "waiting"}
    folder = SimpleNamespace(path=tmp_path, records=[record], record=lambda _: record)
    grid = SimpleNamespace(name="x", defaults=(), study=SimpleNamespace(parallel="auto"))
    assert command._train(grid, folder, [point], SimpleNamespace(connect=id), {}) is None
    assert [seconds / 60 for seconds in started] == [10, 20, 30], "the first failed, and nothing is new after the third"
