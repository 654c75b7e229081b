"""Measure the time that a run stands still after it lost workers."""

from __future__ import annotations

import time


class Pause:
    """The time between a loss and the next step.

    Args:
        step: the last one taken before the loss; 0 if there was none.

    Attributes:
        over: whether the next step was taken.
    """

    def __init__(self, step: int) -> None:
        self.over = False
        self.step = step
        self._last = self._begun = time.monotonic()
        self._spans: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Count the time since the last mark as spent on `name`."""
        now = time.monotonic()
        self._spans[name] = round(self._spans.get(name, 0.0) + now - self._last, 2)
        self._last = now

    def spans(self) -> dict[str, float]:
        """Return the seconds by what was waited for, and in all."""
        return self._spans | {"total": round(self._last - self._begun, 2)}
