"""The lock of a run that is kept at a URL."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from orchestration.storage.url_store import (
    UrlStore,
)

LOCK = "lock.json"
BEAT_S, STALE_S = 10.0, 45.0  # of a lock
_SETTLE_S = 1.0


class UrlLock:
    """Who may write what is below a URL: a file there that its holder writes anew every few seconds.

    Args:
        store: of its own; the lock is kept from a thread of its own.
        folder: the working copy, locked by this process: a holder with the same one on this machine is gone.

    Attributes:
        lost: whether another process has taken it.
    """

    def __init__(self, store: UrlStore, folder: Path) -> None:
        self._store = store
        self._content = {
            "token": uuid.uuid4().hex,
            "holder": f"process {os.getpid()} on {platform.node()}",
            "place": _place(folder),
        }
        self.lost = False
        self._stop = threading.Event()
        self._take()
        self._thread = threading.Thread(target=self._keep, name="storage-lock", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        """Raises: ValueError: another process holds it."""
        found = self._read()
        if found is not None and found.get("place") != self._content["place"]:
            print(
                f"expertail: {self._store.url}: locked by {found.get('holder')}; seeing for {STALE_S:g} s whether it "
                f"is alive",
                file=sys.stderr,
                flush=True,
            )
            end = time.monotonic() + STALE_S
            while time.monotonic() < end:
                time.sleep(1.0)
                if self._went_on(found):
                    break
        self._went_on(found)
        self._write(0)
        time.sleep(_SETTLE_S)  # whoever saw the same stale lock has written his by now
        self.check()

    def _went_on(self, found: dict[str, Any] | None) -> bool:
        """Whether nobody holds it any more.

        Raises:
            ValueError: somebody has written it anew.
        """
        now = self._read()
        if now is not None and now != found:
            raise ValueError(
                f"{self._store.url}: the run is already being carried out by {now.get('holder')}; wait for it, stop "
                f"it, or set another run.name"
            )
        return now is None

    def _read(self) -> dict[str, Any] | None:
        data = self._store.read(LOCK)
        try:
            return None if data is None else dict(json.loads(data))
        except ValueError:
            return {"holder": "an unreadable lock"}

    def _write(self, beat: int) -> None:
        self._store.write(LOCK, json.dumps(self._content | {"beat": beat}, indent=1).encode())

    def _keep(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(ValueError):  # unreachable for now, or lost: `check` says so where it matters
                self.check()
                self._write(beat)

    def check(self) -> None:
        """Raises: ValueError: another process has taken the lock."""
        found = self._read()
        if self.lost or (found is not None and found.get("token") != self._content["token"]):
            self.lost = True
            holder = (found or {}).get("holder", "another process")
            raise ValueError(
                f"{self._store.url}: taken over by {holder}, which saw no sign of this process for {STALE_S:g} s; "
                f"needed one process a run; this one stops, and its copy is made new from there at the next start"
            )

    def release(self) -> None:
        """Let others have it."""
        self._stop.set()
        self._thread.join(timeout=BEAT_S)
        with contextlib.suppress(ValueError):
            self.check()
            self._store.remove([LOCK])
        self.lost = True


def _place(folder: Path) -> str:
    """A working copy on this machine, until it is started again: who has locked its file is alone with it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    status = (folder / ".lock").stat()
    return f"{boot.read_text().strip() if boot.exists() else ''} {platform.node()} {status.st_dev}:{status.st_ino}"
