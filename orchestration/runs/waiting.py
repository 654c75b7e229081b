"""Wait for places that other runs hold: said, noted in run.json and seen in MLflow; a signal ends it.

What could never fit is refused before anybody waits (`Fleet.check_room`).
"""

from __future__ import annotations

from collections.abc import Callable

from orchestration.results.text import duration
from orchestration.runs.run import Run

_SAY_FIRST_S, _SAY_AGAIN_S = 3.0, 60.0


class Waiting:
    """Called about once a second by `Fleet.reserve` while it waits.

    Args:
        run: that waits.
        wait_s: after this many seconds it gives up.
    """

    def __init__(self, run: Run, wait_s: float) -> None:
        self.wait_s = wait_s
        self._run, self._noted, self._say_at = run, False, _SAY_FIRST_S

    def __call__(self, waited_s: float, awaited: Callable[[], str]) -> None:
        """Note the wait once, say it every minute, and end it at a signal.

        Args:
            waited_s: seconds since it began.
            awaited: returns what is waited for, and what is free.

        Raises:
            Stopped: a signal came.
        """
        self._run.raise_if_waiting_is_over(waited_s, awaited)
        if not self._noted:
            self._noted = True
            self._run.folder.record_waiting(self._run.config, awaited())
            self._run.begin_tracking()  # else a run that gives up would leave no trace there
        if waited_s >= self._say_at:
            self._say_at = waited_s + _SAY_AGAIN_S
            spent, most = duration(waited_s), duration(self.wait_s)
            self._run.console.message(f"waiting for {awaited()}; waited {spent} of at most {most}")
