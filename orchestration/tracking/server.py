"""Ask an MLflow server whether a run can be tracked there, with MLflow's own client.

The client brings credentials, certificates, proxies and redirects as an upload would. Three things are done here:
a request is sent once and waits for seconds, where the client repeats it for minutes; a wrong certificate file is named
with the variable that names it, where the client's message names neither; and no reason holds a secret.
"""

from __future__ import annotations

import os
import ssl
import warnings
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from orchestration.config.secrets import redact

_ENDPOINT = "/api/2.0/mlflow/experiments/search"  # a server with users answers it to users only
_AUTHORITY = "MLFLOW_TRACKING_SERVER_CERT_PATH"
_CLIENT = "MLFLOW_TRACKING_CLIENT_CERT_PATH"
_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def ask_server(uri: str, patience_s: float, *, with_credentials: bool = True) -> str | None:
    """Ask a server for one experiment.

    Args:
        uri: of an HTTP server; may hold a user and a password.
        patience_s: the longest wait for a connection, and for an answer.
        with_credentials: send those of the URI and of MLflow's variables and files; none otherwise.

    Returns:
        The reason why a run could not be tracked there, without secrets; None where it could.

    Raises:
        ValueError: variables that name certificates contradict each other, or a file they name holds none.
    """
    _check_certificate_files()

    host = _host(uri)
    if not with_credentials:
        host = _without_credentials(host)

    from mlflow.exceptions import MlflowException
    from mlflow.utils.rest_utils import http_request

    # An `auth` that adds nothing keeps the client from taking a password out of ~/.netrc.
    no_auth: dict[str, Any] = {} if with_credentials else {"auth": lambda request: request}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the operator knows of MLFLOW_TRACKING_INSECURE_TLS
            answer = http_request(
                host, _ENDPOINT, "GET", max_retries=0, timeout=patience_s, raise_on_status=False,
                params={"max_results": 1}, **no_auth,
            )  # fmt: skip
    except MlflowException as error:
        return _connection_problem(error)

    if answer.status_code in (401, 403):
        return f"it denies access ({answer.status_code}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if answer.status_code != 200:
        return f"it answers {answer.status_code} to {_ENDPOINT}"
    return None if _is_json_object(answer) else f"its answer to {_ENDPOINT} is not an MLflow server's"


def has_credentials(uri: str) -> bool:
    """Return whether MLflow's client would send a user or a token to this server."""
    host = _host(uri)
    return bool(urlsplit(uri).password or (host.username and host.password) or host.token)


def _host(uri: str) -> Any:
    """Return the server and the credentials for it as MLflow's client finds them.

    Raises:
        ValueError: variables contradict each other.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by the import
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds

    try:
        return get_default_host_creds(uri)
    except MlflowException as error:
        raise ValueError(redact(str(error))) from None


def _without_credentials(host: Any) -> Any:
    from mlflow.utils.rest_utils import MlflowHostCreds

    parts = urlsplit(host.host)
    return MlflowHostCreds(
        urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])),
        ignore_tls_verification=host.ignore_tls_verification,
        client_cert_path=host.client_cert_path,
        server_cert_path=host.server_cert_path,
    )


def _connection_problem(error: BaseException) -> str:
    """Return the innermost reason of a request that got no answer; those around it repeat the URL."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); set {_AUTHORITY} to its authority's"
    return f"no answer ({redact(str(error).strip())})"


def _is_json_object(answer: Any) -> bool:
    try:
        return isinstance(answer.json(), dict)
    except ValueError:
        return False


def _check_certificate_files() -> None:
    """Load the certificates that variables name, once and for nothing else.

    Raises:
        ValueError: a file holds none.
    """
    # The client takes the first of these variables that is set.
    trusted = next((key for key in (_AUTHORITY, *_BUNDLES) if os.environ.get(key)), None)
    for key in (trusted, _CLIENT):
        path = os.environ.get(key) if key else None
        if not path:
            continue
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if key == _CLIENT:
                context.load_cert_chain(path)
            elif not os.path.isdir(path):
                context.load_verify_locations(path)
        except OSError as error:
            raise ValueError(
                f"{key} = {path}: found no certificate there ({error.strerror or error}); needed a PEM file; "
                f"correct it, or unset it"
            ) from error
