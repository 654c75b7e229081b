"""Where a run is kept: a folder, or a URL with a local copy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from orchestration.config.paths import expand
from orchestration.config.run_config import RunConfig, RunSettings
from orchestration.storage.files import CONFIG
from orchestration.storage.remote_run_folder import RemoteRunFolder
from orchestration.storage.run_folder import RunFolder
from orchestration.storage.url_store import UrlStore, check_url, copy_folder, is_url

STUDY_LANE = "EXPERTAIL_STUDY_LANE"
"""Set for a process that trains runs of a study: it waits for places as a submitted job does."""
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` starts


def is_submitted_job() -> bool:
    """Return whether Ray or a study started this process for somebody who does not sit and watch it."""
    return any(os.environ.get(name) for name in (_JOB, "RAY_JOB_ID", STUDY_LANE))


def run_path(config: RunConfig) -> Path:
    """Return a run's folder, absolute as workers may start elsewhere; for a URL, the copy on this node."""
    if is_url(config.run.dir):
        return copy_folder(config.run.dir, expand(config.run.local_dir)) / config.run_name
    return Path(os.path.abspath(expand(config.run.dir))) / config.run_name


def open_run_folder(config: RunConfig) -> RunFolder:
    """Open and lock a config's run folder.

    Raises:
        ValueError: it cannot be read or written, or another process holds it.
    """
    if is_url(config.run.dir):
        return RemoteRunFolder(run_path(config), f"{config.run.dir.rstrip('/')}/{config.run_name}")
    return RunFolder(run_path(config))


def check_run_dir(config: RunConfig, nodes: int = 1) -> None:
    """Refuse a run folder that would vanish with a job, or be another one on every node.

    Raises:
        ValueError: run.dir is relative, and this is a submitted job or a cluster of several nodes; or it is a URL that
            nothing here opens, or tracked by a file on this node.
    """
    if is_url(config.run.dir):
        check_url(config.run.dir)
        if config.tracking.enabled:
            check_tracking(config)
        return
    if Path(expand(config.run.dir)).is_absolute():
        return
    reason = f"the cluster has {nodes} nodes and each would have a folder of its own" if nodes > 1 else None
    if os.environ.get(_JOB):
        reason = "a submitted job starts in a copy of the working directory that vanishes with it"
    if reason:
        raise ValueError(
            f"run.dir = {config.run.dir}: relative, and {reason}; needed an absolute path on storage that all nodes "
            f"share, or a URL; set run.dir=/... or run.dir=s3://..."
        )


def check_tracking(config: RunConfig) -> None:
    """Refuse to track a run on the node that trains when it may go on from another.

    Raises:
        ValueError: run.dir is a URL and tracking.uri is not set.
    """
    if is_url(config.run.dir) and config.tracking.uri is None:
        raise ValueError(
            f"tracking.uri is not set and run.dir = {config.run.dir}: the MLflow database would lie on this node, and "
            f"the run may go on from another; needed a server; set tracking.uri=http://..., or tracking.enabled=false "
            f"(later: expertail sync RUN --uri http://...)"
        )


@contextlib.contextmanager
def local_run(run: str) -> Iterator[str]:
    """Yield the local folder of a run given by path or URL. For a URL it is a copy; changes are stored at the end.

    Raises:
        ValueError: there is no run at the URL, or it cannot be read or written, or another process holds it.
    """
    if not is_url(run):
        yield run
        return
    check_url(run, "RUN")
    place, _, name = run.rstrip("/").rpartition("/")
    config = UrlStore(run).read(CONFIG)
    if config is None:
        raise ValueError(f"{run}: no run there (no {CONFIG}); needed the URL of one, as {place}/<run.name>")
    folder = RemoteRunFolder(copy_folder(place, expand(_local_dir(config))) / name, run)
    try:
        yield str(folder.path)
        folder.wait_until_stored()
    finally:
        folder.close()


def _local_dir(config: bytes) -> str:
    """Return the folder for copies that a stored config names."""
    try:
        return str(yaml.safe_load(config)["run"]["local_dir"])
    except (yaml.YAMLError, KeyError, TypeError):
        return RunSettings().local_dir
