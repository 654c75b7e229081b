"""Paths as operators write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str) -> Path:
    """An operator's path: ~ and environment variables resolved."""
    return Path(os.path.expandvars(os.path.expanduser(path)))
