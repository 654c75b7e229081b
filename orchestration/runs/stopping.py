"""End a run before its last step: the signals that ask for it, and the errors that the driver raises then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.config.messages import say

_AT_ONCE = (signal.SIGINT, signal.SIGTERM)
"""The second of these ends a run at once."""
_NOTICES = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name))
"""Sent by terminals that close and by batch systems before their limit, some of them more than once."""


class Stopped(BaseException):
    """The run was asked to stop, by Ctrl-C or a signal, and has written a checkpoint if it trained.

    No `Exception`, as KeyboardInterrupt is none: what guards a picture against every fault must let it pass.
    """

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + signal_number


class GivenUp(Exception):
    """A stage that trains beside this one has failed for good; this one has written a checkpoint and ends too."""


class StopSignals:
    """Remembers the first signal that asks for an end, until a checkpoint can be written.

    A second Ctrl-C or SIGTERM acts at once. A notice (SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU) may be repeated, and may be
    followed by a SIGTERM.

    Attributes:
        received: number of the signal; None before one came.
        given_up: set when a stage has failed for good, so that those beside it end too.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.given_up = threading.Event()
        self._at_once = 0

    @contextmanager
    def watch(self) -> Iterator[StopSignals]:
        """Catch signals until the context ends."""
        with _handled(self._note):
            yield self

    def _note(self, number: int, frame: Any) -> None:
        if number in _AT_ONCE:
            self._at_once += 1
            if self._at_once > 1:  # end without another checkpoint
                raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            say(f"{signal.Signals(number).name}: stopping once a checkpoint is written")


@contextmanager
def signals_stop(what: str) -> Iterator[None]:
    """End what runs inside this context at a signal, with an error that says so: no checkpoint is needed.

    Args:
        what: is going on, as the end of a sentence with "while".

    Raises:
        Stopped: a signal came.
    """

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number, f"stopped by {signal.Signals(number).name} while {what}; the same command goes on")

    with _handled(stop):
        yield


@contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle every signal that asks for an end, until the context ends."""
    old = {}  # restored at the end: Ray and the caller have handlers of their own
    for number in (*_AT_ONCE, *_NOTICES):
        # What the caller ignores stays ignored: nohup, and shells that start a process to outlive them.
        if number in _NOTICES and signal.getsignal(number) is signal.SIG_IGN:
            continue
        with suppress(ValueError):  # not in the main thread: a test, or a notebook
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


@dataclass
class Outcome:
    """The end of a stage.

    Attributes:
        stage: its name.
        finished: whether it is trained to its end; False when run.max_steps ended it.
        total_steps: of the whole stage.
        checkpoint: its newest.
        signal: number of one that came after the last chance to stop for it, in the outcome of a run.
        cut: the stages that run.max_steps ended before their end or did not let begin, in the outcome of a run.
    """

    stage: str
    finished: bool
    total_steps: int
    checkpoint: Path
    cut: tuple[str, ...] = ()
    signal: int | None = None
