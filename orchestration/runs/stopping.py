"""End a run before its last step: the signals that ask for it, and the errors that the driver raises then."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written a checkpoint."""

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + signal_number


class GivenUp(Exception):
    """A stage that trains beside this one has failed for good; this one has written a checkpoint and ends too."""


class StopSignals:
    """Remembers SIGINT or SIGTERM until a checkpoint can be written. A second one acts at once.

    Attributes:
        received: number of the signal; None before one came.
        given_up: set when a stage has failed for good, so that those beside it end too.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.given_up = threading.Event()

    @contextmanager
    def watch(self) -> Iterator[StopSignals]:
        """Catch signals until the context ends."""
        old = {}  # restored at the end: Ray and the caller have handlers of their own
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: a test, or a notebook
                old[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:  # the second signal: end at once, without another checkpoint
            raise KeyboardInterrupt
        self.received = number
        print(f"expertail: {signal.Signals(number).name}: stopping once a checkpoint is written", file=sys.stderr)


@dataclass
class Outcome:
    """The end of a stage.

    Attributes:
        stage: its name.
        finished: whether it is trained to its end; False when run.max_steps ended it.
        total_steps: of the whole stage.
        checkpoint: its newest.
        cut: the stages that run.max_steps ended before their end or did not let begin, in the outcome of a run.
    """

    stage: str
    finished: bool
    total_steps: int
    checkpoint: Path
    cut: tuple[str, ...] = ()
