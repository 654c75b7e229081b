"""A terminal has one line that is kept up to date, anything else plain lines alone."""

from __future__ import annotations

import io

import pytest

from orchestration.studies.progress import Progress, seconds_left


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_line_that_stays_below_what_is_said(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    progress = Progress(stream)
    progress.draw("1 of 8 ended, 2 running, 5 waiting")
    progress.draw("too soon after the first")
    progress.say("ce-s0: finished")
    progress.draw("2 of 8 ended")
    progress.close()
    line = "1 of 8 ended, 2 running, 5 wa"
    said = f"\r\x1b[Kexpertail: ce-s0: finished\n{line}"
    assert stream.getvalue() == f"\r\x1b[K{line}{said}\r\x1b[K2 of 8 ended\r\x1b[K"


@pytest.mark.parametrize(("stream", "term"), [(io.StringIO(), "xterm"), (Terminal(), "dumb")])
def test_anything_else_has_plain_lines(stream, term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    progress = Progress(stream)
    progress.draw("1 of 8 ended")
    progress.say("ce-s0: finished")
    progress.close()
    assert stream.getvalue() == "expertail: ce-s0: finished\n"


def test_a_stream_that_is_closed_costs_nothing():
    stream = Terminal()
    progress = Progress(stream)
    stream.close()
    progress.draw("1 of 8 ended")
    progress.say("ce-s0: finished")
    progress.close()


@pytest.mark.parametrize(
    ("took", "since", "waiting", "left"),
    [
        ([], [0.0], 3, None),
        ([100.0, 140.0], [70.0, 40.0], 0, 90.0),  # 120 s each: 90 and 60 s left, side by side
        ([100.0, 140.0], [70.0, 40.0], 2, (90 + 60 + 240) / 2),
        ([100.0], [], 2, 200.0),
        ([100.0], [-900.0], 1, 100.0),  # longer than those before: no time is negative
    ],
)
def test_the_time_left_is_of_runs_that_train_and_of_those_that_follow_them(took, since, waiting, left):
    assert seconds_left(took, since, waiting, now=100.0) == left
