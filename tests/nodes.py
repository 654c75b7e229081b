"""A small Ray cluster of real raylets on this machine, each node with a network, a name and an address of its own.

A node is a network namespace. Its cable (a veth pair) leads to a bridge in another namespace, so the machine's own
network is never touched. Every node also has an interface `docker0` with the same address, as many machines do. Where
namespaces are not allowed, all raylets share this machine's loopback: connections cannot be cut, the rest is the same.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests import runs

_RAY = str(Path(sys.executable).parent / "ray")
_STORE_BYTES = 80_000_000
_START_S = 180
_NAMED = re.compile(r"expertail-(\d+)-\w+")
_ALL_ONE_HOST = "EXPERTAIL_TEST_ONE_HOST"  # if set, act as if namespaces were not allowed

_WATCHER = """
import json, sys, time
import ray
from ray._private.state import actors
from ray.util import placement_group_table
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
while True:
    alive = [name for node in ray.nodes() if node["Alive"] for name in node["Resources"] if name.startswith("place")]
    living = [actor["State"] for actor in actors().values() if actor["State"] != "DEAD"]
    groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    print(json.dumps({"time": time.time(), "nodes": sorted(alive), "actors": living, "groups": groups}), flush=True)
    time.sleep(0.2)
"""


@functools.cache
def why_no_namespaces() -> str | None:
    """Return why nodes cannot have their own networks here, or None if they can."""
    if os.environ.get(_ALL_ONE_HOST):
        return f"{_ALL_ONE_HOST} is set"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "networks of one's own need root and the command `ip` (apt install iproute2)"
    name = f"expertail-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "name", "hub", "type", "bridge")
        _ip("netns", "exec", name, "true")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here ({error.stderr.strip()})"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


class Nodes:
    """The cluster. `place0` is the head; it has no CPU, so the driver runs there and no worker does.

    Args:
        cpus: number of CPUs of each of the other nodes.
    """

    def __init__(self, cpus: Sequence[float]) -> None:
        self.one_host = why_no_namespaces()
        self.names = [f"place{i}" for i in range(len(cpus) + 1)]
        self._cpus = dict(zip(self.names, (0, *cpus), strict=True))
        self._folder = Path(tempfile.mkdtemp(prefix="et", dir="/tmp"))  # short: a socket's path has 107 letters
        self._token = secrets.token_hex(32)
        self._port = 6379 if self.one_host is None else _free_port()
        self._drivers: list[subprocess.Popen[str]] = []
        self._seen: list[dict[str, Any]] = []

    def __enter__(self) -> Nodes:
        try:
            if self.one_host is None:
                self._sweep()
                self._lay_cables()
            self.start(self.names[:1])
            self.start(self.names[1:])
            self._watch()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Networks

    def _space(self, name: str) -> str:
        return f"expertail-{os.getpid()}-{name}"

    def _lay_cables(self) -> None:
        hub = self._space("hub")
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "name", "hub", "type", "bridge")
        _ip("-n", hub, "link", "set", "hub", "up")
        for name in self.names:
            space = self._space(name)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "add", "name", "docker0", "type", "bridge")
            _ip("-n", space, "link", "add", "name", "eth0", "type", "veth", "peer", "name", name, "netns", hub)
            for interface, address in (("docker0", "172.17.0.1/16"), ("eth0", f"{self.address(name)}/24")):
                _ip("-n", space, "address", "add", address, "dev", interface)
            for interface in ("lo", "docker0", "eth0"):
                _ip("-n", space, "link", "set", interface, "up")
            _ip("-n", hub, "link", "set", name, "master", "hub", "up")

    @staticmethod
    def _sweep() -> None:
        """Remove the namespaces that killed test processes left behind."""
        for found in _NAMED.finditer(_ip("netns", "list")):
            if not psutil.pid_exists(int(found[1])):
                _remove(found[0])

    def address(self, name: str) -> str:
        """Return the address of a node."""
        return "127.0.0.1" if self.one_host else f"10.77.0.{self.names.index(name) + 1}"

    @property
    def ray_address(self) -> str:
        return f"{self.address('place0')}:{self._port}"

    def unplug(self, name: str) -> None:
        """Cut a node off from all others: packets vanish without an error."""
        _ip("-n", self._space("hub"), "link", "set", name, "down")

    def separate(self, *names: str) -> None:
        """Cut some nodes off from one another; the rest of the cluster can still reach them, and they it."""
        for name in names:
            _ip("-n", self._space("hub"), "link", "set", name, "type", "bridge_slave", "isolated", "on")

    def heal(self) -> None:
        """Reconnect all nodes."""
        if self.one_host is None:
            for name in self.names:
                _ip("-n", self._space("hub"), "link", "set", name, "up")
                _ip("-n", self._space("hub"), "link", "set", name, "type", "bridge_slave", "isolated", "off")

    # Processes

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "GLOO_", "NCCL_"))}
        return kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_prestart_worker_first_driver": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def command(self, name: str, *words: str) -> list[str]:
        """Wrap a command so that it runs on a node."""
        return list(words) if self.one_host else ["ip", "netns", "exec", self._space(name), *words]

    def start(self, names: Sequence[str]) -> None:
        """Start Ray on nodes and wait until they have joined: all at once, then the slow ones one by one."""
        starting = [(name, self._start(name)) for name in names]
        slow = [name for name, process in starting if process.wait(_START_S) != 0]
        for name in slow:
            for _ in range(3):  # Ray gives a node 30 s, which a busy machine may not keep
                self._clear(name)
                if self._start(name).wait(_START_S) == 0:
                    break
            else:
                raise RuntimeError(f"ray start on {name}:\n{self._log(name).read_text()}")

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        words = [
            f"--node-ip-address={self.address(name)}",
            f"--num-cpus={self._cpus[name]}",
            f"--resources={json.dumps({name: 1})}",
            f"--object-store-memory={_STORE_BYTES}",
            f"--temp-dir={self._folder / name}",
            "--include-log-monitor=false",
        ]
        if name == self.names[0]:
            words += ["--head", f"--port={self._port}", "--include-dashboard=false"]
            words += [f"--ray-client-server-port={_free_port()}"] if self.one_host else []
        else:
            words.append(f"--address={self.ray_address}")
        command = self.command(name, _RAY, "start", *words)
        with self._log(name).open("w") as out:
            return subprocess.Popen(command, env=self._environment(), stdout=out, stderr=subprocess.STDOUT)

    def _clear(self, name: str) -> None:
        """End the processes that are left of a node."""
        if self.one_host is None:
            _kill(lambda: _pids(self._space(name)))
        elif raylet := self.raylet(name):
            raylet.kill()

    def train(self, folder: Path, *words: str, common: Sequence[str] = runs.SMALL) -> subprocess.Popen[str]:
        """Start `expertail train` on the head as a process; the run is `folder`, its output goes to `folder.log`."""
        return self.on_head(
            folder.with_suffix(".log"),
            *("-m", "orchestration", "train", *common, f"run.dir={folder.parent}", f"run.name={folder.name}"),
            *words,
        )

    def on_head(self, log: Path, *words: str, inside: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
        """Start Python on the head as a process.

        Args:
            log: file for its output.
            words: its arguments.
            inside: command that starts it.
            environment: additional environment variables.
        """
        with log.open("a") as out:
            self._drivers.append(
                subprocess.Popen(
                    self.command("place0", *inside, sys.executable, *words),
                    env=self._environment()
                    | {"RAY_ADDRESS": self.ray_address, "PYTHONPATH": str(Path(__file__).parents[1])}
                    | environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return self._drivers[-1]

    def raylet(self, name: str) -> psutil.Process | None:
        """Return a node's raylet, or None if it is not running."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or [""]
            if words[0].endswith("/raylet") and any(f"{self._folder / name}/" in word for word in words):
                return process
        return None

    def node_of(self, pid: int) -> str:
        """Return the node whose raylet started a worker."""
        parent = psutil.Process(pid).ppid()
        return next(name for name in self.names if (raylet := self.raylet(name)) and raylet.pid == parent)

    def crash(self, name: str) -> float:
        """Kill the raylet of a node, and its workers with it. Returns the time in Unix seconds."""
        raylet = self.raylet(name)
        assert raylet is not None, f"{name} is not running"
        raylet.kill()
        return time.time()

    def restore(self) -> None:
        """Reconnect the network and restart lost nodes."""
        self.heal()
        for driver in self._drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        self._drivers = []
        self.wait(lambda seen: not seen["actors"], "all actors gone")
        for _ in range(2):  # a node that was cut off may find out only now that it is counted as dead
            known = self.state()["nodes"]
            missing = {name for name in self.names if name not in known or self.raylet(name) is None}
            for name in missing:
                self._clear(name)
            self.wait(lambda seen: missing.isdisjoint(seen["nodes"]), f"{missing} counted as dead")  # noqa: B023
            self.start(sorted(missing))
            self.wait(lambda seen: seen["nodes"] == self.names, "all nodes")

    # What Ray reports

    def _watch(self) -> None:
        command = self.command("place0", sys.executable, "-c", _WATCHER, self.ray_address)
        with (self._folder / "watcher.log").open("w") as log:
            self._watcher = subprocess.Popen(
                command, env=self._environment(), stdout=subprocess.PIPE, stderr=log, text=True
            )
        threading.Thread(target=self._read, daemon=True).start()
        self.wait(lambda seen: seen["nodes"] == self.names, "all nodes")

    def _read(self) -> None:
        assert self._watcher.stdout is not None
        with self._watcher.stdout as lines:
            for line in lines:
                if line.startswith("{"):  # Ray prints there too
                    self._seen.append(json.loads(line))

    def state(self) -> dict[str, Any]:
        """Return the living nodes' names and the states of actors and placement groups, as Ray reports them now."""
        asked = time.time()
        runs.wait_until(lambda: bool(self._seen) and self._seen[-1]["time"] > asked, "word from Ray", 60)
        return self._seen[-1]

    def wait(self, reached: Callable[[dict[str, Any]], bool], what: str, limit_s: float = 120) -> dict[str, Any]:
        """Wait until Ray's report meets a condition, and return the report."""
        end = time.monotonic() + limit_s
        while not reached(seen := self.state()):
            if time.monotonic() >= end:
                raise TimeoutError(f"{what}: not so after {limit_s} s; Ray says {seen}")
        return seen

    def first(self, reached: Callable[[dict[str, Any]], bool], since: float) -> float | None:
        """Return the time (Unix seconds) of Ray's first report after `since` that meets a condition."""
        return next((seen["time"] for seen in list(self._seen) if seen["time"] > since and reached(seen)), None)

    def close(self) -> None:
        """End all processes and remove all namespaces and files. Goes on past failures."""
        for space in map(self._space, (*self.names, "hub")):
            if self.one_host is None:
                _remove(space)
        for process in self._drivers + [p for p in [getattr(self, "_watcher", None)] if p is not None]:
            process.kill()
            process.wait()
        if self.one_host is not None:
            _kill(self._ours)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ours(self) -> list[int]:
        """Return the processes of this cluster, recognised by its folder, and their children."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self._folder) in word for word in process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += [process.pid, *(child.pid for child in process.children(recursive=True))]
        return found


def _remove(space: str) -> None:
    """Remove a namespace and everything that runs in it."""
    spaces = Path("/run/netns", space)
    if spaces.exists():
        _kill(lambda: _pids(space))
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _pids(space: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", space).split()]


def _kill(find: Callable[[], list[int]]) -> None:
    """Send SIGKILL until no process is left, for at most five seconds."""
    for _ in range(50):
        pids = find()
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]
