"""Paths as operators write them."""

from __future__ import annotations

import os
from pathlib import Path

import orchestration


def expand(path: str) -> Path:
    """An operator's path: ~ and environment variables resolved."""
    return Path(os.path.expandvars(os.path.expanduser(path)))


def code_root() -> Path:
    """The folder that our packages lie in: a checkout, or site-packages."""
    return Path(orchestration.__file__).resolve().parents[1]
