"""The lock of a run that is kept at a URL."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from orchestration.config.messages import say
from orchestration.storage.url_store import UrlStore

LOCK = "lock.json"
BEAT_S = 10.0  # how often the holder rewrites the lock
STALE_S = 45.0  # a lock unchanged for this long has no holder; several beats, as one may be lost or late
_SETTLE_S = 1.0  # how long two processes that take a lock at once wait for each other's write


class UrlLock:
    """A lock file at a URL. Its holder rewrites it every few seconds; a lock that stays unchanged is taken over.

    Args:
        store: used by this lock alone, because a thread rewrites the file while others transfer files.
        folder: the working copy, which this process has locked. So another holder with the same copy is dead.

    Attributes:
        lost: whether another process has taken it over.
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
        """Write the lock, once it is certain that no process holds it. Stores of files have no way to lock one.

        Raises:
            ValueError: another process holds it.
        """
        found = self._read()
        # A holder with this same working copy is dead, since this process has the copy's own lock.
        if found is not None and found.get("place") != self._content["place"]:
            say(f"{self._store.url}: locked by {found.get('holder')}; waiting {STALE_S:g} s for it to answer")
            end = time.monotonic() + STALE_S
            while time.monotonic() < end:
                time.sleep(1.0)
                if self._is_gone(found):
                    break
        self._is_gone(found)  # a last look, for the error
        self._write(0)
        time.sleep(_SETTLE_S)  # another that saw the same stale lock has written too by now; the later wins
        self.check()

    def _is_gone(self, found: dict[str, Any] | None) -> bool:
        """Say whether the lock file is gone.

        Raises:
            ValueError: a holder has rewritten it.
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
        """Refuse to go on if another process has taken the lock. A lock file that is missing is no sign of that.

        Raises:
            ValueError: another process has taken the lock.
        """
        found = self._read()
        if self.lost or (found is not None and found.get("token") != self._content["token"]):
            self.lost = True
            holder = (found or {}).get("holder", "another process")
            raise ValueError(
                f"{self._store.url}: taken over by {holder}, which saw no sign of this process for {STALE_S:g} s; "
                f"needed one process per run; this one stops, and the next start here downloads the run again"
            )

    def release(self) -> None:
        """Stop rewriting the lock and remove it, unless another process has taken it."""
        self._stop.set()
        self._thread.join(timeout=BEAT_S)
        with contextlib.suppress(ValueError):
            self.check()
            self._store.remove([LOCK])
        self.lost = True  # an upload that still hangs in its thread must not go on


def _place(folder: Path) -> str:
    """Identify a working copy on this machine until it reboots; only one process can hold the lock of its file."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    status = (folder / ".lock").stat()
    return f"{boot.read_text().strip() if boot.exists() else ''} {platform.node()} {status.st_dev}:{status.st_ino}"
