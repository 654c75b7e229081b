"""A disk that is full when a checkpoint or the journal is to be written: one message, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading

import pytest

from tests import runs
from tests.e2e.test_resume import same, undisturbed  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.ray, pytest.mark.drill]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 64 MiB in memory; yields it and a function that leaves only so many bytes free."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs; run as root")

    def leave(size):
        ballast = place / "ballast"
        ballast.unlink(missing_ok=True)
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        if size is not None:
            with contextlib.suppress(OSError):  # training writes as well
                ballast.write_bytes(bytes(max(0, free - size)))

    yield place, leave
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("left", [300_000, 0], ids=["at a checkpoint", "at the journal"])
def test_a_full_disk_ends_the_run_with_a_message_and_nothing_is_lost(left, undisturbed, warm, small_disk, capsys):  # noqa: F811
    place, leave = small_disk
    folder = place / "run"

    def fill():
        runs.wait_for_step(folder, 9)
        leave(left)

    filling = threading.Thread(target=fill)
    filling.start()
    assert runs.train(folder) == 1
    filling.join()
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "make room there" in message
    assert "the same command continues" in message
    assert "Traceback" not in message
    assert not list((folder / "checkpoints").glob(".*"))
    leave(None)
    assert runs.train(folder) == 0
    same(folder, undisturbed)
