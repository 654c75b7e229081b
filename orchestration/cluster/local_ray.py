"""A Ray on this machine alone, for runs that name no cluster."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator

import ray

_OBJECT_STORE_BYTES = 256 * 2**20  # for numbers and scores; files of checkpoints at a URL may spill to disk
_ATTEMPTS = 3


def start_own_ray() -> None:
    """Start Ray's processes here, without dashboard, quietly; they end with this process.

    Raises:
        ValueError: they did not come up in time, again and again; Ray gives each other half a minute.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    begun = time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _groups_of_their_own(), _no_fixed_ports():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            return
        except Exception as error:  # Ray raises no type of its own
            ray.shutdown()  # what did come up
            if "timed out" not in str(error):
                raise
            if attempt == _ATTEMPTS:
                raise ValueError(
                    f"Ray's own processes did not come up in {_ATTEMPTS} attempts and {time.monotonic() - begun:.0f} s "
                    f"({str(error).splitlines()[0]}); load is {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores; try "
                    f"again when this machine is quieter, or start a Ray by hand and set RAY_ADDRESS"
                ) from error


@contextlib.contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Ray's processes do not share this command's process group while this lasts.

    A SIGTERM for the whole group (from `timeout`, a service manager, a batch system) asks this command to stop, and it
    needs Ray for the checkpoint that it writes first. Ray offers no setting for it, but calls one function in each new
    process before its program begins; all of them still end with this process.
    """
    from ray._private import utils

    end_with_parent = utils.set_kill_on_parent_death_linux

    def begin() -> None:
        os.setpgrp()
        end_with_parent()

    utils.set_kill_on_parent_death_linux = begin
    try:
        yield
    finally:
        utils.set_kill_on_parent_death_linux = end_with_parent


@contextlib.contextmanager
def _no_fixed_ports() -> Iterator[None]:
    """Ray's processes open only ports that the system finds free while this lasts.

    `ray.init` has no setting for two that do not: 52365 of the agent, which tries for 3 s where another Ray of this
    machine has it and goes on without; and 44217 of the autoscaler, which has nothing to do here.
    """
    from ray._private import parameter

    usual = parameter.RayParams
    parameter.RayParams = functools.partial(usual, dashboard_agent_listen_port=0, no_monitor=True)  # type: ignore
    try:
        yield
    finally:
        parameter.RayParams = usual  # type: ignore[misc]
