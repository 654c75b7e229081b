"""The doctor's question to a tracking server: one request, seconds of patience, a reason for each kind of failure."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time

import pytest

from orchestration.tracking.server import ask_server, has_credentials


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Give each test no proxy, no variables and no files of a user."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@contextlib.contextmanager
def answering(status, body, **headers):
    """Run a server with one answer; yield its host:port and the Authorization and Cookie of each request."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.headers.get("Authorization"), self.headers.get("Cookie")))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", seen
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b'{"experiments": []}', None),
        (200, b"<html>a router's page</html>", "is not an MLflow server's"),
        (200, b"[]", "is not an MLflow server's"),
        (404, b"", "it answers 404 to /api/2.0/mlflow/experiments/search"),
        (401, b"", "it denies access (401)"),
        (403, b'{"error_code": "PERMISSION_DENIED"}', "it denies access (403)"),
        (429, b"", "it answers 429"),
        (503, b"", "it answers 503"),
    ],
)
def test_each_answer_has_its_reason_and_nothing_is_asked_twice(status, body, reason):
    with answering(status, body, Retry_After="30") as (place, seen):
        problem = ask_server(f"http://me:s3cret@{place}/", 2.0)
    assert (problem is None) if reason is None else (reason in problem)
    assert len(seen) == 1 and "s3cret" not in str(problem)


def test_a_server_that_accepts_and_never_answers_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        problem = ask_server(f"http://me:s3cret@127.0.0.1:{silent.getsockname()[1]}", 0.3)
    assert time.monotonic() - start < 5
    assert problem == "no answer (timed out)"


@pytest.mark.parametrize("uri", ["http://me:s3cret@127.0.0.1:1", "http://me:s3cret@no such host", "http://me:s3cret@"])
def test_a_server_that_cannot_be_reached_is_named_without_the_password(uri):
    problem = ask_server(uri, 1.0)
    assert problem.startswith("no answer (") and "s3cret" not in problem


def test_without_credentials_none_are_sent_whatever_files_and_variables_hold(monkeypatch, tmp_path):
    with answering(200, b"{}") as (place, seen):
        (tmp_path / ".netrc").write_text(f"machine {place.split(':')[0]} login me password s3cret\n")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
        assert ask_server(f"http://me:s3cret@{place}", 2.0, with_credentials=False) is None
        assert ask_server(f"http://{place}", 2.0) is None
    assert [credentials for credentials, _ in seen] == [None, "Basic bWU6czNjcmV0"]


def test_a_user_or_a_token_counts_as_credentials(monkeypatch):
    assert not has_credentials("http://host") and has_credentials("http://me:s3cret@host")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    assert not has_credentials("http://host")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    assert has_credentials("http://host")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    assert has_credentials("http://host")
