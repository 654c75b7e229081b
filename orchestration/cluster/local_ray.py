"""A Ray on this machine alone, for runs that name no cluster."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from pathlib import Path

import ray

from experts.data.cpus import usable_cpus
from orchestration.cluster.ray_internals import no_fixed_ports, own_code_in_workers, own_process_groups
from orchestration.config.messages import say

_OBJECT_STORE_BYTES = 256 * 2**20  # for numbers and scores; files of checkpoints at a URL may spill to disk
_LONGEST_FOLDER = 38  # bytes: the path of a socket has at most 107, and Ray adds 68
_ATTEMPTS = 3  # on a busy machine Ray's processes may miss each other's time limits


def start_local_ray() -> None:
    """Start Ray's processes here, quietly and without a dashboard. They end with this process.

    Raises:
        ValueError: they did not come up in several attempts. Ray gives its processes half a minute to find each other.
    """
    _use_short_folder()
    _use_own_token()
    # Ray's default by now; earlier versions warn if it is unset.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    begun = time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with own_process_groups(), no_fixed_ports(), own_code_in_workers():
                ray.init(
                    address="local",
                    num_cpus=usable_cpus(),  # by itself Ray counts those of the machine
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            return
        except Exception as error:  # Ray raises no type of its own
            ray.shutdown()  # ends the processes that did come up
            if "timed out" not in str(error):
                raise
            if attempt == _ATTEMPTS:
                raise ValueError(
                    f"Ray's own processes did not come up in {_ATTEMPTS} attempts and {time.monotonic() - begun:.0f} s "
                    f"({str(error).splitlines()[0]}); load is {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores; try "
                    f"again when this machine is quieter, or start a Ray by hand and set RAY_ADDRESS"
                ) from error


def _use_short_folder() -> None:
    """Take /tmp for the sockets of Ray (RAY_TMPDIR, else TMPDIR) and of loaders (TMPDIR), which need short paths.

    Raises:
        ValueError: /tmp cannot be written; names what to set.
    """
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        folder = os.environ.get(variable, "")
        if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
            continue
        if not os.access("/tmp", os.W_OK):
            raise ValueError(
                f"{variable} = {folder}: too long for the sockets of Ray and of loader processes, at most "
                f"{_LONGEST_FOLDER} bytes, and /tmp cannot be written; set {variable} to a shorter folder"
            )
        say(f"{variable} = {folder} is too long for sockets; /tmp is used")
        os.environ[variable] = "/tmp"
        tempfile.tempdir = None  # Python remembers what it found first


def _use_own_token() -> None:
    """Give this process and its Ray a token of their own, where Ray could not keep one in the home folder."""
    home = Path.home()
    kept = home / ".ray" / "auth_token"
    if any(name.startswith("RAY_AUTH_") for name in os.environ):
        return
    try:
        if kept.exists():
            usable = bool(kept.read_text().strip())  # a full disk left an empty one
        else:
            nearest = next(folder for folder in (kept.parent, home, *home.parents) if folder.exists())
            with tempfile.TemporaryFile(dir=nearest) as file:  # neither permissions nor a full disk show otherwise
                file.write(bytes(64))
                file.flush()
            usable = True
    except OSError:
        usable = False
    if not usable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
