"""What one of the doctor's checks found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What one check found. `state` is "ok", "warn" (a run may still work) or "FAIL" (it cannot, or not as asked)."""

    state: str
    what: str
    text: str
