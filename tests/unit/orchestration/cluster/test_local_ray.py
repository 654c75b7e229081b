"""A Ray of our own keeps its sockets and its token on machines that have little room for them."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest

from orchestration.cluster import local_ray

LONG = "/scratch/a_rather_long_folder_of_a_batch_job_1234567/tmp"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_is_too_long_for_sockets_is_replaced_and_said(monkeypatch, capsys, variable):
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv(variable, LONG)
    local_ray._use_short_folder()
    assert os.environ[variable] == "/tmp"
    assert f"{variable} = {LONG} is too long for sockets; /tmp is used" in capsys.readouterr().err


def test_a_short_folder_for_ray_hides_no_long_one_of_loader_processes(monkeypatch, capsys):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/r")
    monkeypatch.setenv("TMPDIR", LONG)
    monkeypatch.setattr(tempfile, "tempdir", LONG)
    local_ray._use_short_folder()
    assert (os.environ["RAY_TMPDIR"], os.environ["TMPDIR"]) == ("/tmp/r", "/tmp")
    assert tempfile.gettempdir() == "/tmp"
    assert capsys.readouterr().err == f"expertail: TMPDIR = {LONG} is too long for sockets; /tmp is used\n"


def test_without_tmp_the_message_names_the_variable(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", LONG)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="set TMPDIR to a shorter folder"):
        local_ray._use_short_folder()


def test_a_home_that_is_full_or_cannot_be_written_gets_a_token_for_this_process(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("RAY_AUTH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # restored after the test
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    local_ray._use_own_token()
    assert "RAY_AUTH_TOKEN" not in os.environ and not [*tmp_path.iterdir()]

    def refuse(dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(tempfile, "TemporaryFile", refuse)
        full.setenv("RAY_AUTH_TOKEN_PATH", "/their/token")
        local_ray._use_own_token()
        assert "RAY_AUTH_TOKEN" not in os.environ
        full.delenv("RAY_AUTH_TOKEN_PATH")
        local_ray._use_own_token()
        assert len(os.environ.pop("RAY_AUTH_TOKEN")) == 64
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()  # Ray made it, and had no room for its content
    local_ray._use_own_token()
    assert len(os.environ.pop("RAY_AUTH_TOKEN")) == 64
    (tmp_path / ".ray" / "auth_token").write_text("kept")
    local_ray._use_own_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
