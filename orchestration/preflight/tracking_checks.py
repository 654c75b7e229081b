"""Whether the tracking store that a config names can be used, from the machine that will upload to it."""

from __future__ import annotations

import base64
import http.client
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import certifi

from orchestration.config.secrets import redact
from orchestration.preflight.finding import Finding, nearest_existing
from orchestration.storage.url_store import is_url
from orchestration.tracking.uri import check_uri, default_uri, sqlite_path

if TYPE_CHECKING:
    from orchestration.config.run_config import RunConfig

_LATER = "training goes on without it and `expertail sync RUN` uploads later"
_INSECURE = "MLFLOW_TRACKING_INSECURE_TLS"
_AUTHORITY = "MLFLOW_TRACKING_SERVER_CERT_PATH"
_OWN = "MLFLOW_TRACKING_CLIENT_CERT_PATH"
_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_ASKED = "/api/2.0/mlflow/experiments/search?max_results=1"  # what a server with users answers to users only


def check_tracking(config: RunConfig, patience_s: float) -> Iterator[Finding]:
    """Look at a SQLite file, or ask a server whether it is well, takes our credentials and asks for any.

    Args:
        config: checked.
        patience_s: how long to wait for an answer.

    Raises:
        ValueError: the URI is not one of a tracking store, or variables that name certificates are wrong.
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
        yield _sqlite(database)
    elif uri.startswith(("http://", "https://")):
        yield from _server(uri, patience_s)
    else:
        yield Finding("warn", "tracking", f"{redact(uri)}: stores of this kind are not checked; {_LATER}")


def _sqlite(path: Path) -> Finding:
    there = nearest_existing(path)
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(16)
        if start and start != b"SQLite format 3\x00":
            text = f"tracking.uri: {path} is not a SQLite file; needed one, or a path where one can be made"
            return Finding("FAIL", "tracking", text)
    usable = path.is_file() if path.exists() else there.is_dir()
    if not usable or not os.access(there, os.W_OK):
        text = f"tracking.uri: {path} cannot be written; make it writable, or choose another with tracking.uri"
        return Finding("FAIL", "tracking", text)
    return Finding("ok", "tracking", f"SQLite file {path}{'' if path.exists() else ', to be made'}")


def _server(uri: str, patience_s: float) -> Iterator[Finding]:
    from orchestration.preflight.node_checks import is_loopback

    parts = urlsplit(uri)
    credentials = _credentials(parts)
    problem = _ask(parts, "/health", credentials, patience_s) or _ask(parts, _ASKED, credentials, patience_s)
    if problem is not None:
        yield Finding(
            "FAIL",
            "tracking",
            f"tracking.uri = {redact(uri)}: {problem}; needed an MLflow server; start it, correct the URI, or set "
            f"tracking.enabled=false ({_LATER})",
        )
        return
    yield Finding("ok", "tracking", f"{redact(uri)} answers")
    if not is_loopback(parts.hostname or "") and _ask(parts, _ASKED, None, patience_s) is None:
        yield Finding(
            "warn",
            "tracking",
            f"{redact(uri)} shows and takes runs without a user; whoever reaches it can change them; start it with "
            f"`mlflow server --app-name basic-auth`, or let it listen on a loopback address only",
        )
    if credentials and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        yield Finding("warn", "tracking", f"{redact(uri)}: credentials cross the network in the clear; use https")


def _credentials(parts: SplitResult) -> str | None:
    """What goes into the Authorization header, as MLflow's client does it."""
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return f"Bearer {token}" if token else None


def _ask(parts: SplitResult, what: str, credentials: str | None, patience_s: float) -> str | None:
    """Ask a server something. Returns what is wrong, in words.

    Raises:
        ValueError: see `_trusted`.
    """
    path, _, query = what.partition("?")
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + path, query=query)
    request = urllib.request.Request(urlunsplit(bare))
    if credentials:
        request.add_header("Authorization", credentials)
    opener = urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=_trusted()))
    try:
        with opener.open(request, timeout=patience_s):
            return None
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"it refuses us ({error.code}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f"it answers {error.code} to {path}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({reason.verify_message}); set {_AUTHORITY} to its authority's"
        return f"no answer ({str(reason).strip()})"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Credentials follow to the same place alone, or from http to https there, as with MLflow's client."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        following = super().redirect_request(req, *args)
        if following is not None:
            old, new = _place(req.full_url), _place(following.full_url)
            upgraded = ("https", old[1], 443) if old[::2] == ("http", 80) else old
            if new not in (old, upgraded):
                following.remove_header("Authorization")
        return following


def _place(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _trusted() -> ssl.SSLContext:
    """Which servers are believed to be who they say: as MLflow's client does, and requests below it.

    Raises:
        ValueError: they contradict each other, or do not name certificates.
    """
    insecure = os.environ.get(_INSECURE, "").lower() in ("true", "1")
    authority, own = os.environ.get(_AUTHORITY), os.environ.get(_OWN)
    if insecure and authority:
        raise ValueError(f"{_INSECURE} and {_AUTHORITY} are both set; MLflow's client takes one of them; unset one")
    key = next((name for name in (_AUTHORITY, *_BUNDLES) if os.environ.get(name)), "certifi")
    try:
        believed = os.environ.get(key) or certifi.where()
        is_folder = os.path.isdir(believed)
        context = ssl.create_default_context(
            cafile=None if is_folder else believed, capath=believed if is_folder else None
        )
        key = _OWN
        if own:
            context.load_cert_chain(own)
    except OSError as error:
        raise ValueError(
            f"{key} = {os.environ.get(key)}: found no certificate there ({error.strerror or error}); needed a PEM "
            f"file; correct it, or unset it"
        ) from error
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
