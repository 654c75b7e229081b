"""The findings of `expertail doctor`, and what its checks have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from orchestration.config.secrets import redact


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        state: "ok", "warn" (a run may still work) or "FAIL" (it cannot, or not as configured).
        what: the subject, e.g. "memory".
        text: what was found, what was needed, what to do.
    """

    state: str
    what: str
    text: str


def run_check(what: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings of a check; if it raises, the error is the last one."""
    found: list[Finding] = []
    try:
        found.extend(check())  # a generator: what it yields before an error is kept
    except Exception as error:
        text = redact(str(error).strip()) or "no message"
        found.append(
            Finding("FAIL", what, text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")
        )
    return found


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be reached from this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
