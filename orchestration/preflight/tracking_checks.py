"""Check that the tracking store of a config can be used from the machine that will upload to it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestration.config.secrets import redact
from orchestration.preflight.checks import Finding, is_loopback, nearest_existing
from orchestration.storage.url_store import is_url
from orchestration.tracking.server import ask_server, has_credentials
from orchestration.tracking.uri import check_uri, default_uri, sqlite_path

if TYPE_CHECKING:
    from orchestration.config.run_config import RunConfig

_LATER = "training goes on without it and `expertail sync RUN` uploads later"


def check_tracking(config: RunConfig, patience_s: float) -> Iterator[Finding]:
    """Check a SQLite file, or ask a server whether it answers, accepts our credentials and demands any.

    Args:
        config: the run's.
        patience_s: the longest wait for an answer.

    Raises:
        ValueError: the URI is not that of a tracking store, or variables that name certificates are wrong.
    """
    from orchestration.config.paths import expand

    if not config.tracking.enabled:
        yield Finding("ok", "tracking", "off; `expertail sync RUN` can upload later")
        return
    if config.tracking.uri is None and is_url(config.run.dir):
        yield Finding("FAIL", "tracking", f"tracking.uri is not set; needed with run.dir = {config.run.dir}")
        return
    uri = check_uri(config.tracking.uri or default_uri(expand(config.run.dir)))
    database = sqlite_path(uri)
    if database is not None:
        yield _sqlite(database, config.tracking.experiment)
    elif uri.startswith(("http://", "https://")):
        yield from _server(uri, patience_s)
    else:
        yield Finding("warn", "tracking", f"{redact(uri)}: stores of this kind are not checked; if it fails, {_LATER}")


def _sqlite(path: Path, experiment: str) -> Finding:
    """Check that a SQLite file can be written, or created where it is missing, and takes runs of an experiment."""
    there = nearest_existing(path)
    # MLflow would fail on another file only when the first run is uploaded. An empty file is a database, too.
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(16)
        if start and start != b"SQLite format 3\x00":
            text = f"tracking.uri: {path} is not a SQLite file; needed one, or a path where one can be created"
            return Finding("FAIL", "tracking", text)
    usable = path.is_file() if path.exists() else there.is_dir()
    if not usable or not os.access(there, os.W_OK):
        text = f"tracking.uri: {path} cannot be written; make it writable, or choose another with tracking.uri"
        return Finding("FAIL", "tracking", text)
    if number := _find_deleted(path, experiment):
        text = (
            f"tracking.experiment = {experiment}: deleted in {path}; restore it with `mlflow experiments restore "
            f"--experiment-id {number}`, or choose another name"
        )
        return Finding("FAIL", "tracking", text)
    return Finding("ok", "tracking", f"SQLite file {path}{'' if path.exists() else ', to be created'}")


def _find_deleted(path: Path, experiment: str) -> str | None:
    """Return the id of an experiment that a SQLite file holds as deleted; None where it takes runs, or has none."""
    if not path.exists():
        return None
    asked = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'"
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as store:
        try:
            found = store.execute(asked, (experiment,)).fetchone()
        except sqlite3.Error:  # an empty file, or one that is busy
            return None
    return None if found is None else str(found[0])


def _server(uri: str, patience_s: float) -> Iterator[Finding]:
    """Check that a server accepts our credentials, and that it demands some if other machines can reach it."""
    parts = urlsplit(uri)
    is_remote = not is_loopback(parts.hostname or "")
    # Ask without credentials first: a cookie from the other answer would count as credentials.
    open_to_all = is_remote and ask_server(uri, patience_s, with_credentials=False) is None
    if problem := ask_server(uri, patience_s):
        yield Finding(
            "FAIL",
            "tracking",
            f"tracking.uri = {redact(uri)}: {problem}; needed an MLflow server; start it, correct the URI, or set "
            f"tracking.enabled=false ({_LATER})",
        )
        return
    yield Finding("ok", "tracking", f"{redact(uri)} answers")
    if open_to_all:
        yield Finding(
            "warn",
            "tracking",
            f"{redact(uri)} lets anyone read and write runs; start it with "
            f"`mlflow server --app-name basic-auth`, or let it listen on a loopback address only",
        )
    if is_remote and parts.scheme == "http" and has_credentials(uri):
        yield Finding("warn", "tracking", f"{redact(uri)}: credentials cross the network in the clear; use https")
