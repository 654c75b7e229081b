"""Every use of Ray's private modules, each with what public Ray lacks. Check them when Ray's version changes."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from ray.exceptions import RayError

from orchestration.config.paths import import_roots


def draining_nodes() -> dict[str, int]:
    """Return the ids of the nodes that Ray has been told to drain, each with its deadline.

    The public list of nodes does not say which are being drained.

    Returns:
        Deadlines as unix milliseconds, 0 for none. Empty while the head is out of reach: a lost node is noticed anyway.
    """
    from ray._private.state import state

    try:
        return dict(state.get_draining_nodes())
    except (RayError, RuntimeError):
        return {}


def token_headers() -> dict[str, str]:
    """Return the headers with this process's token for a cluster; empty without one.

    `ray.init` uses the token, but has no way to try it: it says only that it could not connect.
    """
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    return dict(get_auth_headers_if_auth_enabled({}))


def token_needed() -> bool:
    """Say whether Ray's processes on this node ask for a token. No public function says so."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def rays_of_this_host() -> tuple[set[str], str | None]:
    """Return the addresses of the Rays that run here, and of the one that `ray start` started or joined last, if any.

    Asked for 'auto', `ray.init` takes any of them, and warns of it where nobody sees it.
    """
    from ray._private.services import find_bootstrap_address, find_gcs_addresses

    return set(find_gcs_addresses()), find_bootstrap_address(None)


@contextlib.contextmanager
def own_process_groups() -> Iterator[None]:
    """Keep the Ray processes that start inside this context out of this command's process group.

    A SIGTERM for the whole group (from `timeout`, a service manager, a batch system) asks this command to stop, and it
    needs Ray for the checkpoint that it writes first. Batch systems also send notices to each process of a job, which
    would end those that do not know them. Ray has no setting for it, but calls one function in each new
    process before its program begins; all of them still end with this process.
    """
    from ray._private import utils

    end_with_parent = utils.set_kill_on_parent_death_linux

    def begin() -> None:
        os.setpgrp()
        for notice in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
            if number := getattr(signal, notice, None):
                signal.signal(number, signal.SIG_IGN)  # inherited by the program that begins, and by its workers
        end_with_parent()

    utils.set_kill_on_parent_death_linux = begin
    try:
        yield
    finally:
        utils.set_kill_on_parent_death_linux = end_with_parent


@contextlib.contextmanager
def own_code_in_workers() -> Iterator[None]:
    """Let workers of a connection made inside this context find our packages, and none of the current directory.

    Ray puts the driver's current directory first on the workers' path, where a folder named `experts` would stand
    before our package. It has no setting against that. A job with a working directory is left as it is.
    """
    from ray.job_config import JobConfig

    usual = JobConfig.__init__

    def begin(config: JobConfig, *args: Any, **kwargs: Any) -> None:
        usual(config, *args, **kwargs)
        config._py_driver_sys_path = _Replaced(config._py_driver_sys_path)

    JobConfig.__init__ = begin  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        JobConfig.__init__ = usual  # type: ignore[assignment,method-assign]


class _Replaced(list[str]):
    """A list that gets our own folders where Ray adds the driver's."""

    def extend(self, added: Iterable[str]) -> None:
        del added
        super().extend(import_roots())


@contextlib.contextmanager
def no_fixed_ports() -> Iterator[None]:
    """Let the Ray processes that start inside this context open only ports that the system finds free.

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
