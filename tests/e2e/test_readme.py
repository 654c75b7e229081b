"""The README says what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orchestration.cli import _parser
from orchestration.config.compose import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\s*(?:\.venv/bin/)?expertail (.+?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    options = _parser().parse_args(shlex.split(command))
    if options.command in ("train", "plan") and options.overrides:
        load_config(options.overrides)


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:experts|orchestration|tests|deploy|configs|benchmarks)/[\w./-]+)`", README)))
)
def test_every_file_named_exists(path):
    assert (ROOT / path).exists(), path
