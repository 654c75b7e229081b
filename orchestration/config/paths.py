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
"""What stands before the name of a run in the same run.dir, in the place of a path: it stays true where both move."""


def absolute_run_dir(run_dir: str) -> str:
    """Return run.dir as an absolute path; a URL stays as it is."""
    return run_dir if "://" in run_dir else os.path.abspath(expand(run_dir))


def as_sibling(run_dir: str, path: str) -> str:
    """Return the folder of a run as a sibling where it lies in an absolute run.dir, and as it is elsewhere."""
    parent, name = os.path.split(path)
    return f"{SIBLING}{name}" if name and parent == run_dir else path


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
