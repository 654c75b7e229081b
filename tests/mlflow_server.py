"""A real MLflow server on a real PostgreSQL, and a proxy before it that can misbehave."""

from __future__ import annotations

import contextlib
import http.client
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.runs import wait_until


def free_port() -> int:
    """Return a port of this machine on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Return whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def hurry(folder: Path) -> None:
    """Raise a run's uploader from the lowest priority: on a busy machine a drill would wait minutes for its imports."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if "orchestration.tracking.sender" in words and str(folder) in words:
                for thread in (process / "task").iterdir():
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)
                (process / "autogroup").write_text("0")


class PostgreSQL:
    """A database cluster of its own in a temporary folder, on 127.0.0.1, without passwords."""

    def __init__(self) -> None:
        self.port = free_port()
        self.programs = _programs()
        self.user = "expertail"
        # Not below pytest's folder, which only its owner may enter: PostgreSQL refuses to run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self._owner = _unprivileged() if os.geteuid() == 0 else None
        if self._owner:
            shutil.chown(self.folder, self._owner)
        initdb = ["initdb", "-D", str(self.folder / "data"), "-U", self.user, "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(self._command(*initdb), check=True, capture_output=True, cwd=self.folder, user=self._owner)
        self.start()

    def start(self) -> None:
        command = self._command(
            "postgres", "-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder),
            "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200",
        )  # fmt: skip
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, user=self._owner)
        wait_until(self._ready, f"PostgreSQL at port {self.port}", 60)

    def stop(self) -> None:
        """Stop at once, as after a loss of power; the next start recovers."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(60)

    def create(self, name: str, template: str = "template1") -> str:
        """Create a database; return its URI."""
        self._ask("postgres", f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return f"postgresql+psycopg2://{self.user}@127.0.0.1:{self.port}/{name}"

    def remove(self) -> None:
        """Stop it and delete its folder."""
        self.stop()
        shutil.rmtree(self.folder)

    def _ready(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        return self._ask("postgres", "SELECT 1", check=False) == 0

    def _ask(self, database: str, statement: str, *, check: bool = True) -> int:
        command = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", self.user, "-d", database, "-c", statement]
        return subprocess.run(self._command(*command), check=check, capture_output=True, cwd=self.folder).returncode

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [str(self.programs / program), *arguments]


def _programs() -> Path:
    """Return the folder of PostgreSQL's programs; skip the test where there are none."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/local/bin")]
    if found := shutil.which("initdb"):
        folders.insert(0, Path(found).resolve().parent)
    for folder in folders:
        if all((folder / program).exists() for program in ("initdb", "postgres", "psql")):
            return folder
    pytest.skip("needs PostgreSQL's initdb, postgres and psql: apt-get install postgresql")


def _unprivileged() -> str:
    """Return a user that PostgreSQL agrees to run as; skip the test where there is none."""
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


class Server:
    """`mlflow server` on 127.0.0.1, which serves artefacts too; the same port after each start."""

    def __init__(self, store: str, folder: Path) -> None:
        self.port, self.store, self.folder = free_port(), store, folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start it and return at once."""
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip

    def start(self) -> None:
        """Start it and wait until it answers."""
        if self.process is None:
            self.begin()
        wait_until(lambda: answers(self.port), f"MLflow at port {self.port}")

    def kill(self) -> None:
        """kill -9 of the whole process group."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass(frozen=True)
class Fault:
    """The fault of one request."""

    delay_s: float = 0.0
    """The server gets it at once; the answer comes this much later."""
    status: int | None = None
    """The proxy answers with this; the server never sees the request."""
    lose_answer: bool = False
    """The server carries the request out; the connection is cut before the answer."""


class Proxy:
    """A proxy before a server; `rule` says what goes wrong with a request (method, path, credentials)."""

    def __init__(self, port: int) -> None:
        self.rule: Callable[[str, str, str], Fault | None] = lambda method, path, credentials: None
        self.seen: list[tuple[str, str, Fault | None]] = []
        self.server_port = port
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def _carry_out(self) -> None:
        body = self._body()
        fault = self.proxy.rule(self.command, self.path.split("?")[0], self.headers.get("Authorization", ""))
        self.proxy.seen.append((self.command, self.path.split("?")[0], fault))
        fault = fault or Fault()
        if fault.status is not None:
            self._answer(fault.status, [("Content-Type", "text/html")], b"<html>the gateway says no</html>")
            return
        try:
            status, headers, content = self._ask_server(body)
        except OSError:
            status, headers, content = 502, [], b"no server"
        time.sleep(fault.delay_s)
        if fault.lose_answer:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _carry_out

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":  # which an empty file comes as
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _ask_server(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=60)
        left_out = ("host", "connection", "accept-encoding", "authorization", "transfer-encoding")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
        finally:
            connection.close()
        passed = ("content-type", "content-disposition", "location")
        return answer.status, [(k, v) for k, v in answer.getheaders() if k.lower() in passed], content

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client has given up
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass
