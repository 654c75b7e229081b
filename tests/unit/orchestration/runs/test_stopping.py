"""Signals that ask a run to stop: remembered, acted on at once, or left to whoever ignores them."""

from __future__ import annotations

import os
import signal

import pytest

from orchestration.runs.stopping import Stopped, StopSignals, signals_stop

NOTICES = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.fixture(autouse=True)
def not_ignored():
    """Tests may run under nohup, which has SIGHUP ignored; the runs below are not."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in NOTICES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *NOTICES])
def test_the_first_signal_is_remembered_and_said(number, capsys):
    before = signal.getsignal(number)
    with StopSignals().watch() as signals:
        send(number)
        assert signals.received == number
    assert signal.getsignal(number) == before
    assert f"{signal.Signals(number).name}: stopping once a checkpoint is written" in capsys.readouterr().err


def test_a_second_request_acts_at_once_and_a_repeated_notice_does_not():
    with StopSignals().watch() as signals:
        for number in (*NOTICES, signal.SIGHUP, signal.SIGTERM):  # a batch system: notices, then the end
            send(number)
        assert signals.received == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", NOTICES)
def test_what_the_caller_ignores_stays_ignored(number):
    """As nohup does with SIGHUP."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals().watch() as signals, signals_stop("training"):
            send(number)
        assert signals.received is None
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, *NOTICES])
def test_where_no_checkpoint_is_needed_a_signal_ends_the_run_with_its_own_status(number):
    said = f"{signal.Signals(number).name} while its report was written"
    with pytest.raises(Stopped, match=said) as caught, signals_stop("its report was written"):
        send(number)
    assert caught.value.exit_code == 128 + number


def test_a_terminal_that_is_gone_takes_nothing_from_the_run(monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, text=""):
            raise OSError(5, "Input/output error")

        flush = fileno = write

    monkeypatch.setattr("sys.stderr", Gone())
    with StopSignals().watch() as signals:
        send(signal.SIGHUP)
    assert signals.received == signal.SIGHUP
