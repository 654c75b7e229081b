"""Machines inside this one, with their own processes, network, host name, home and /tmp/ray; removed with the test.

A test may use default ports there and call `ray stop`, which ends every Ray it sees; nothing outside is touched.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import psutil

ADDRESS = "10.77.0.1"
HOST = "site-head"
_UNSHARE = ["unshare", "--pid", "--fork", "--mount", "--net", "--uts", "--kill-child", "--mount-proc"]


def missing(*commands: str) -> str | None:
    """Return why a sandbox with these commands is not possible here, or None if it is."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    absent = [name for name in ("unshare", "nsenter", "ip", *commands) if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found"
    if subprocess.run([*_UNSHARE, "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode:
        return "namespaces are not allowed here"
    return None


class Sandbox:
    """One machine inside this one.

    Args:
        folder: for its home and the files of its servers; at the same path inside and outside.
        venv: the virtual environment that it sees as /opt/expertail.
        address: its IP address.
        host: its host name.
        beside: another machine to connect it with; None: it has no connection.
    """

    def __init__(
        self, folder: Path, venv: Path, address: str = ADDRESS, host: str = HOST, beside: Sandbox | None = None
    ) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        # A shell, because the first process must reap orphans.
        self._process = subprocess.Popen([*_UNSHARE, "bash", "-c", "sleep infinity & wait"])
        end = time.monotonic() + 10
        while not (children := psutil.Process(self._process.pid).children()):
            if time.monotonic() > end:
                raise TimeoutError("unshare has started nothing in 10 s")
            time.sleep(0.01)
        self._inside = children[0].pid
        passwd = folder / "passwd"
        lines = Path("/etc/passwd").read_text().splitlines()
        lines = [f"root:x:0:0:root:{self.home}:/bin/bash" if line.startswith("root:") else line for line in lines]
        passwd.write_text("\n".join(lines) + "\n")
        hosts = folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{address} {host}\n")
        self.run(
            f"""
            set -e
            hostname {host}
            mount -t tmpfs tmpfs /tmp/ray; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /opt
            mount --bind {passwd} /etc/passwd; mount --bind {hosts} /etc/hosts
            ln -s {shlex.quote(str(venv))} /opt/expertail
            ip link set lo up
            ip link add site0 type bridge
            ip address add {address}/24 dev site0
            ip link set site0 up
            ip route add default dev site0
            """
        )
        if beside is not None:
            self._join(beside)

    def _join(self, other: Sandbox) -> None:
        """Connect the bridges of two machines."""
        ends = [f"port{self._inside}", f"port{other._inside}"]
        cable = ["ip", "link", "add", ends[1], "netns", str(self._inside), "type", "veth"]
        subprocess.run([*cable, "peer", "name", ends[0], "netns", str(other._inside)], check=True)
        for machine, end in zip((other, self), ends, strict=True):
            machine.run(f"ip link set {end} master site0 up")

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # and with it everything inside
        self._process.wait()

    def popen(self, script: str, **environment: str) -> subprocess.Popen[str]:
        """Start a bash script inside, in its home."""
        clean = {"HOME": str(self.home), "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        kept = {
            key: os.environ[key] for key in ("LANG", "DS_ACCELERATOR", "MLFLOW_DISABLE_TELEMETRY") if key in os.environ
        }
        return subprocess.Popen(
            ["nsenter", "-t", str(self._inside), "-p", "-m", "-n", "-u", "bash", "-c", f"cd ~; {script}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean | kept | environment,
        )

    def run(self, script: str, *, limit_s: float = 60, code: int | None = 0, **environment: str) -> str:
        """Run a bash script and return its output; it must end with this exit code, or with any if None."""
        process = self.popen(script, **environment)
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise TimeoutError(f"{script}: not done after {limit_s:g} s\n{output}") from None
        assert code is None or process.returncode == code, f"{script}: exit code {process.returncode}\n{output}"
        return output
