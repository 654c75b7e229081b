"""The URI of an MLflow server or database."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from orchestration.config.secrets import redact

SCHEMES = ("sqlite", "http", "https", "databricks", "postgresql", "mysql", "mssql")


def check_uri(uri: str) -> str:
    """Return the URI of a tracking store, a relative SQLite path made absolute.

    Raises:
        ValueError: a tracking store has no such scheme.
    """
    parts = urlsplit(uri)
    if parts.scheme.split("+")[0] not in SCHEMES and uri != "databricks":
        raise ValueError(
            f"tracking.uri = {redact(uri)}: needed the URI of a tracking store, as http://host:5000 or "
            f"sqlite:////path/mlflow.db (known: {', '.join(SCHEMES)})"
        )
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a SQLite file's URI; None for any other URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(os.path.abspath(uri.removeprefix("sqlite:///")))


def artifact_folder(uri: str, runs_dir: Path) -> str | None:
    """Return where the files of a new experiment go: beside a database; None where the server decides."""
    if uri.startswith(("http", "databricks")):
        return None
    database = sqlite_path(uri)
    return (Path(os.path.abspath(runs_dir if database is None else database.parent)) / "mlartifacts").as_uri()


def default_uri(runs_dir: str | os.PathLike[str]) -> str:
    """Return the store of operators without a server: one SQLite file for all runs of a folder."""
    return f"sqlite:///{Path(os.path.abspath(runs_dir)) / 'mlflow.db'}"
