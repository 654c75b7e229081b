"""Lanes: processes that train one run of a study after another. This is their parent's side.

    parent -> lane    standard input: {"ray": address, "study": folder} once, then a line of JSON per run: {"run": ...}
    lane -> parent    a pipe of its own, a line of JSON per event: {"event": "ready" | "began" | "ended", "run": ...};
                      {"event": "said", "text": ...} is for those who watch the study

A lane whose standard input ends has lost its parent, or has no more to do: it writes a checkpoint if it trains, and
ends. A lane that dies costs the steps since the newest checkpoint of the one run that it trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orchestration.config.paths import import_roots

LOG_FILE = "lanes.log"
PARENT_GONE_S = 900.0
"""Seconds that a run whose parent has gone may take to write its checkpoint; then its process ends."""
_DIED = "died"


class Event(NamedTuple):
    """A message of a lane, or its end.

    Attributes:
        lane: that says it.
        kind: "ready", "began", "ended", "said"; "died" once its process has ended.
        values: what else it says.
    """

    lane: Lane
    kind: str
    values: Mapping[str, Any]


class Lane:
    """One process.

    Attributes:
        number: of it, from 1.
        run: that it trains; None while it is idle.
        ready: whether it has loaded its libraries and waits for a run.
        ending: whether it was told to end.
        released: whether it has given back the places that it kept.
        process: of it.
    """

    def __init__(self, number: int, process: subprocess.Popen[bytes], events: int) -> None:
        self.number, self.process, self.events = number, process, events
        self.run: str | None = None
        self.ready = self.ending = self.released = False
        self.first_memory_mib: float | None = None
        self._text = b""

    def connect(self, address: str, study: Path) -> None:
        """Tell it where Ray and the study are. It has loaded its libraries meanwhile."""
        self._send({"ray": address, "study": str(study)})

    def give(self, job: Mapping[str, Any]) -> None:
        """Let it train a run. One that has died meanwhile says so by its end."""
        self.run = str(job["run"])
        self._send(job)

    def release(self) -> None:
        """Let it give back the places that it keeps, as there is nothing to train for it now."""
        if not self.released:
            self.released = True
            self._send({})

    def _send(self, job: Mapping[str, Any]) -> None:
        self.released = self.released and "run" not in job
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(dict(job)).encode() + b"\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Let it end once it is idle; it stops a run that it trains."""
        self.ending = True
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def send(self, number: int) -> None:
        """Send it a signal; nothing if it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return what it has said since the last call, and whether it can say more."""
        chunk = os.read(self.events, 65536)
        *lines, self._text = (self._text + chunk).split(b"\n")
        return [json.loads(line) for line in lines], bool(chunk)


class Lanes:
    """The lanes of a study.

    Args:
        command: that a lane runs; the number of its event pipe is appended.
        folder: of the study; what lanes say outside runs is appended to lanes.log there.
        environment: beside this process's own.
        inherited: open files that lanes inherit, such as the lock of the study.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], inherited: Sequence[int] = ()
    ) -> None:
        self._command, self._folder = tuple(command), folder
        path = os.pathsep.join(import_roots() + list(filter(None, [os.environ.get("PYTHONPATH")])))
        self._environment = {**os.environ, "PYTHONPATH": path, **environment}
        self._inherited = tuple(inherited)
        self._selector = selectors.DefaultSelector()
        self._started = 0
        self._address: str | None = None
        self.alive: list[Lane] = []

    def connect(self, address: str) -> None:
        """Let all lanes, those that are started later too, connect to Ray."""
        self._address = address
        for lane in self.alive:
            lane.connect(address, self._folder)

    def start(self) -> Lane:
        """Start one more. It is ready once it is connected, too."""
        reads, writes = os.pipe()
        self._started += 1
        with open(self._folder / LOG_FILE, "ab") as log, open(writes, "wb", buffering=0):
            process = subprocess.Popen(
                [*self._command, str(writes)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(writes, *self._inherited),
                start_new_session=True,  # Ctrl-C is for the parent, which tells its lanes
                env=self._environment,
            )  # fmt: skip
        lane = Lane(self._started, process, reads)
        self._selector.register(reads, selectors.EVENT_READ, lane)
        self.alive.append(lane)
        if self._address is not None:
            lane.connect(self._address, self._folder)
        return lane

    def events(self, wait_s: float) -> list[Event]:
        """Return what lanes say within some seconds; as soon as one says something."""
        found = []
        for key, _ in self._selector.select(wait_s):
            lane: Lane = key.data
            said, more = lane.read()
            found += [Event(lane, str(values.pop("event")), values) for values in said]
            if not more:
                found.append(self._bury(lane))
        return found

    def _bury(self, lane: Lane) -> Event:
        self._selector.unregister(lane.events)
        os.close(lane.events)
        with contextlib.suppress(OSError):
            assert lane.process.stdin is not None
            lane.process.stdin.close()
        self.alive.remove(lane)
        return Event(lane, _DIED, {"code": lane.process.wait()})

    def stop(self, number: int) -> None:
        """Pass a signal on to those that train, and let the others end."""
        for lane in self.alive:
            if lane.run is None:
                lane.end()
            else:
                lane.send(number)

    def finish(self, report: Callable[[str], None]) -> None:
        """Let all end, and wait for them.

        Args:
            report: takes what they say meanwhile, each line once.
        """
        for lane in self.alive:
            lane.end()
        heard = set[str]()
        while self.alive:
            for event in self.events(1.0):
                text = event.values.get("text")
                if text and text not in heard:
                    heard.add(text)
                    report(text)

    def close(self) -> None:
        """End all of them at once. Goes on past failures."""
        for lane in list(self.alive):
            lane.send(signal.SIGKILL)
            self._bury(lane)
        self._selector.close()
