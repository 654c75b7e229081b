"""The command line: help, wrong usage, and the commands that need no run."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings

import pytest
import torch
from safetensors import safe_open

from orchestration import cli
from orchestration.cli import main
from orchestration.config.words import RECIPE_GROUPS, available
from orchestration.storage.pretrained import _whole_network


def test_every_command_explains_itself(capsys):
    for command in (
        "train",
        "sweep",
        "plan",
        "evaluate",
        "regions",
        "features",
        "import-weights",
        "report",
        "doctor",
        "sync",
    ):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"expertail {command}" in capsys.readouterr().out


def test_a_sweep_without_values_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep"])
    assert "KEY=V1,V2" in capsys.readouterr().err


def test_import_weights_writes_safetensors_and_says_what_it_found(tmp_path, capsys):
    state = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in _whole_network(10, 1).items()}
    torch.save({**state, "fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)}, tmp_path / "net.pth")
    target = tmp_path / "weights" / "net.safetensors"
    assert main(["import-weights", str(tmp_path / "net.pth"), str(target)]) == 0
    printed = capsys.readouterr().out
    assert "ResNet-10" in printed and "left out the head (fc.weight, fc.bias)" in printed and str(target) in printed
    with safe_open(target, "pt") as file:
        assert set(file.keys()) == set(state)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [("missing.pth", "net.safetensors", "no such file"), ("missing.pth", "net.pth", "ends in .safetensors")],
)
def test_import_weights_fails_in_one_line(source, target, words, tmp_path, capsys):
    assert main(["import-weights", str(tmp_path / source), str(tmp_path / target)]) == 1
    said = capsys.readouterr().err
    assert words in said and said.startswith("expertail: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train", "--epochs", "5"], "unrecognized arguments: --epochs; needed one of the options of `expertail train"),
        (["plan", "seed=1", "--lr=1"], "keys as a.b=value without dashes, e.g. dataset.root=/data"),
        (["sync", "runs/x", "y"], "unrecognized arguments: y; needed one of the options of `expertail sync --help`"),
        (["method=ride", "seed=1"], "needed a command first, e.g. expertail train method=ride seed=1"),
    ],
)
def test_wrong_usage_is_answered_with_what_would_be_right(words, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert hint in capsys.readouterr().err


def test_the_list_names_every_choice_in_lines_that_fit_a_screen(capsys):
    assert main(["train", "--list"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    for group in RECIPE_GROUPS:
        listed = re.findall(rf"^  {group}=(\S+)", printed, re.MULTILINE)
        if not listed:  # of these the names alone, on one line or more
            listed = re.split(
                r"\s*\|?\s+", printed.partition(f"\n{group}=")[2].partition("\n")[2].split("\n\n")[0].strip()
            )
        assert sorted(listed) == available(group)


@pytest.mark.parametrize("way", ["PYTHONWARNINGS", "-W"])
def test_warnings_of_libraries_end_no_command_and_none_of_its_processes(way, monkeypatch, capsys):
    """Processes that multiprocessing starts get the options of -W again."""
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning" if way == "PYTHONWARNINGS" else "")
    monkeypatch.setattr(sys, "warnoptions", ["error"] if way == "-W" else [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cli._warn_only()
        for kind in (DeprecationWarning, ResourceWarning):
            warnings.warn("put in", kind, stacklevel=1)
    assert "PYTHONWARNINGS" not in os.environ and sys.warnoptions == []
    assert f"expertail: {way} = error is not applied: libraries warn while they load" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "handed_on"), [("2", "1"), ("1", "1"), ("", "")])
def test_processes_keep_their_docstrings(given, handed_on, monkeypatch, capsys):
    """Ray's agent adds to a docstring and ends where there is none; the command would wait for it for minutes."""
    monkeypatch.setenv("PYTHONOPTIMIZE", given)
    cli._keep_docstrings()
    assert os.environ["PYTHONOPTIMIZE"] == handed_on
    assert ("PYTHONOPTIMIZE = 2 is 1 for" in capsys.readouterr().err) == (given == "2")


def test_a_sigterm_that_ray_answers_ends_a_command_as_any_other(monkeypatch, capsys):
    """Ray's handler, in place until a run watches for signals, exits with the bare number."""

    def ray_answers(options):
        sys.exit(signal.SIGTERM)

    monkeypatch.setitem(cli.TRAINING, "doctor", cli.TRAINING["doctor"]._replace(carry_out=ray_answers))
    assert main(["doctor"]) == 143
    assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().err


def test_a_traceback_has_no_password(capsys):
    uri = "tracking.uri=postgresql://me:hunter2@db/m"
    assert main(["plan", "--traceback", "method=ride", uri, "nonsense"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "nonsense" in said and "hunter2" not in said
