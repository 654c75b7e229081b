"""The URI of an MLflow server or database."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
            f"sqlite:////path/mlflow.db (known: {', '.join(SCHEMES)}); set it, or MLFLOW_TRACKING_URI"
        )
    path = sqlite_path(uri)
    if path is None:
        return uri
    _, question, query = uri.partition("?")
    return sqlite_uri(path) + question + query


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite file, in whose path % and ? would have a meaning of their own.

    MLflow makes the folder of a URI as it is written there, and would leave an empty a%3Fb beside a?b. So slashes from
    the first such name on are written as %2F: then it makes the folder above, which is there.
    """
    above, slash, rest = str(path).rpartition("/")
    while "%" in above or "?" in above:
        above, slash, name = above.rpartition("/")
        rest = f"{name}/{rest}"
    quoted = rest.replace("%", "%25").replace("?", "%3F").replace("/", "%2F")
    return f"sqlite:///{above}{slash}{quoted}"


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a SQLite file's URI; None for any other URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(os.path.abspath(unquote(uri.removeprefix("sqlite:///").partition("?")[0], errors="surrogateescape")))


def artifact_folder(uri: str, runs_dir: Path) -> str | None:
    """Return where the files of a new experiment go: beside a database; None where the server decides."""
    if uri.startswith(("http", "databricks")):
        return None
    database = sqlite_path(uri)
    return (Path(os.path.abspath(runs_dir if database is None else database.parent)) / "mlartifacts").as_uri()


def default_uri(runs_dir: str | os.PathLike[str]) -> str:
    """Return the store of operators without a server: one SQLite file for all runs of a folder."""
    return sqlite_uri(Path(os.path.abspath(runs_dir)) / "mlflow.db")
