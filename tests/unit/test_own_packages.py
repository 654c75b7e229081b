"""Our packages are found where folders of other projects have their names, or the message names those."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("experts", "aggregation", "configs")


@pytest.fixture
def theirs(tmp_path):
    """Folders with the names of our packages, one of them a package."""
    for name in NAMES:
        (tmp_path / name).mkdir()
    (tmp_path / "experts" / "__init__.py").write_text("ours = False\n")
    return tmp_path


def python(code, theirs, *, first=True):
    """Run code in a process that finds their folders before ours, or after."""
    path = os.pathsep.join(map(str, (theirs, ROOT) if first else (ROOT, theirs)))
    words = [sys.executable, "-P", "-c", code]
    return subprocess.run(
        words, env=os.environ | {"PYTHONPATH": path}, cwd=theirs, capture_output=True, text=True, check=False
    )


def test_a_command_takes_our_packages(theirs):
    code = "import orchestration, experts, experts.data, configs; print(experts.__file__)"
    done = python(code, theirs)
    assert done.stdout.strip() == str(ROOT / "experts" / "__init__.py"), done.stderr


def test_processes_of_a_command_take_them_too(theirs):
    """Their command, and the flag that keeps the current directory out of the way."""
    done = python("from orchestration.config.paths import import_roots; print(import_roots())", theirs)
    assert done.stdout.strip() == str([str(ROOT)])
    assert '"-P", "-m"' in (ROOT / "orchestration" / "tracking" / "uploader.py").read_text()


@pytest.mark.parametrize("needs", ["orchestration", "aggregation"])
def test_a_package_that_is_imported_already_is_named(theirs, needs):
    """As in a process that serves a model and has an `experts` of its own."""
    done = python(f"import experts, sys; sys.path.remove({str(theirs)!r}); import {needs}", theirs)
    assert done.returncode == 1
    assert f"{theirs / 'experts'}" in done.stderr and "rename the other package" in done.stderr


def test_a_folder_behind_ours_changes_nothing(theirs):
    code = "import sys; before = list(sys.path); import orchestration, aggregation; assert sys.path == before"
    assert python(code, theirs, first=False).returncode == 0


def test_an_imported_deploy_of_another_project_is_in_nobodys_way(theirs):
    (theirs / "deploy").mkdir()
    (theirs / "deploy" / "__init__.py").touch()
    done = python("import deploy, orchestration; print(deploy.__file__)", theirs)
    assert done.stdout.strip() == str(theirs / "deploy" / "__init__.py"), done.stderr


def test_the_command_is_ours_where_another_project_has_an_orchestration(theirs):
    """The script that pip makes imports `expertail`; where theirs is loaded already, the message names it."""
    (theirs / "orchestration").mkdir()
    (theirs / "orchestration" / "__init__.py").touch()
    script = "import sys; from expertail import main; sys.argv = ['expertail', '--version']; sys.exit(main())"
    assert python(script, theirs).stdout.startswith("expertail ")
    done = python(f"import orchestration; {script}", theirs)
    assert done.returncode == 1
    assert str(theirs / "orchestration") in done.stderr and "take it off PYTHONPATH" in done.stderr
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"expertail": "expertail:main"}
