"""Paths as operators write them."""

from __future__ import annotations

import os
from pathlib import Path

import orchestration


def expand(path: str) -> Path:
    """Return an operator's path with ~ and environment variables replaced."""
    return Path(os.path.expandvars(os.path.expanduser(path)))


def code_root() -> Path:
    """Return the folder of our packages: a checkout, or site-packages."""
    return Path(orchestration.__file__).resolve().parents[1]
