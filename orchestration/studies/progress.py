"""The progress of a study: on a terminal one line that is kept up to date, anywhere else plain lines."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import TextIO

from orchestration.config.messages import say, show

_CLEAR = "\r\x1b[K"
_EVERY_S = 1.0  # between two drawings


def seconds_left(took: Sequence[float], since: Sequence[float], waiting: int, now: float) -> float | None:
    """Return about how long the runs of a study still take; None before one has ended.

    Args:
        took: seconds of each run that has ended well.
        since: when each run that trains now began, unix seconds.
        waiting: runs that have not begun.
        now: unix seconds.
    """
    if not took:
        return None
    mean = fmean(took)
    training = [max(mean - (now - began), 0.0) for began in since]
    # Those that wait begin as places become free, as many at once as train now.
    return max([*training, (sum(training) + mean * waiting) / max(len(since), 1)])


class Progress:
    """Says lines, and keeps one below them on a terminal; never raises.

    Args:
        stream: a terminal gets the line that is kept up to date; a dumb one and anything else plain lines alone.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._drawn, self._at = "", -math.inf
        self._terminal = False
        with contextlib.suppress(Exception):
            self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        """Say a line; the one that is kept up to date stays below it."""
        self._write(_CLEAR if self._drawn else "")
        if self._stream is sys.stderr:
            say(text)
        else:
            show(f"expertail: {text}", self._stream)
        self._write(self._drawn)
        self._at = -math.inf  # what was said has changed how far the study is

    def draw(self, text: str) -> None:
        """Bring the line up to date, at most once per second."""
        if not self._terminal or time.monotonic() - self._at < _EVERY_S:
            return
        self._at = time.monotonic()
        self._drawn = text[: max(shutil.get_terminal_size().columns - 1, 1)]
        self._write(_CLEAR + self._drawn)

    def close(self) -> None:
        """Take the line away."""
        self._write(_CLEAR if self._drawn else "")
        self._drawn = ""

    def _write(self, text: str) -> None:
        if text:
            with contextlib.suppress(Exception):
                self._stream.write(text)
                self._stream.flush()
