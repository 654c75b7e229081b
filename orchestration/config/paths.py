"""Paths as operators write them."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import orchestration


def expand(path: str) -> Path:
    """Return an operator's path with ~ and environment variables replaced; what exists as it is typed stays so.

    A shell has replaced them already, so a `$` that is left is part of a name; a YAML file has not.
    """
    path = os.path.expanduser(path)
    return Path(path if os.path.lexists(path) else os.path.expandvars(path))


SIBLING = "sibling:"
"""What stands before the name of another run in the same run.dir, in the place of a path."""


def sibling_of(run: str) -> str | None:
    """Return the name of a run that is named as a sibling; None of a path."""
    return run.removeprefix(SIBLING) if run.startswith(SIBLING) else None


def import_roots() -> list[str]:
    """Return what another process needs on its path to import our packages: nothing where they are installed.

    Folders of other projects with the names of our packages may make this process need our root first on its path;
    then the others do, too.
    """
    root = str(code_root())
    return [] if root == sysconfig.get_path("purelib") and sys.path[0] != root else [root]


def code_root() -> Path:
    """Return the folder of our packages: a checkout, or site-packages."""
    return Path(orchestration.__file__).resolve().parents[1]
