"""What one of the doctor's checks found, and what the checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestration.config.secrets import redact


@dataclass(frozen=True)
class Finding:
    """What one check found. `state` is "ok", "warn" (a run may still work) or "FAIL" (it cannot, or not as asked)."""

    state: str
    what: str
    text: str


def guarded(what: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check found; where it broke, that is the last finding."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:
        text = redact(str(error).strip()) or "no message"
        found.append(
            Finding("FAIL", what, text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")
        )
    return found


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
