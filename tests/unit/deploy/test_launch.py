"""The launcher finds expertail, passes words on and gives the exit code back."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import launch

ROOT = Path(launch.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_ray_address(monkeypatch):
    """The launcher sets it for its process; nothing of that outlives a test."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.delenv("RAY_ADDRESS")


@pytest.mark.parametrize("words", [["--", "plan", "seed=0"], ["plan", "seed=0"]])
def test_words_and_exit_code_are_passed_on(words, monkeypatch):
    seen = []
    monkeypatch.setattr("orchestration.cli.main", lambda arguments: seen.append(arguments) or 7)
    assert launch.main(words) == 7
    assert seen == [["plan", "seed=0"]]


def test_a_copied_launcher_finds_the_checkout_it_is_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "home" / "launch.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("orchestration.cli.main", lambda arguments: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/other")
    monkeypatch.setenv("EXPERTAIL_ROOT", str(ROOT))
    assert launch.main(["plan"]) == 0
    assert sys.path[0] == str(ROOT)


@pytest.mark.parametrize(("before", "used"), [(None, "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_the_run_uses_the_ray_of_the_node_unless_told_otherwise(before, used, monkeypatch):
    if before:
        monkeypatch.setenv("RAY_ADDRESS", before)
    seen = []
    monkeypatch.setattr("orchestration.cli.main", lambda arguments: seen.append(os.environ["RAY_ADDRESS"]) or 0)
    assert launch.main(["train"]) == 0
    assert seen == [used]


def test_a_copied_launcher_without_expertail_says_so(tmp_path):
    """-S leaves out site-packages, as on a node where nothing is installed."""
    copy = shutil.copy(launch.__file__, tmp_path / "launch.py")
    done = subprocess.run(
        [sys.executable, "-S", str(copy), "train"], cwd=tmp_path, env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no checkout found beside this launcher" in done.stderr
