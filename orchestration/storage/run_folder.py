"""The folder of one run: who may write it, what it holds, whether a config belongs to it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from orchestration import __version__
from orchestration.config.compose import from_yaml, to_yaml
from orchestration.config.identity import config_hash, deciding_keys, difference, identity
from orchestration.config.paths import code_root
from orchestration.config.run_config import RunConfig
from orchestration.config.secrets import redact
from orchestration.storage.files import CONFIG, DATA, LOCK, RUN, write_atomic, write_json

_LIBRARIES = ("torch", "torchvision", "ray", "deepspeed", "mlflow", "numpy", "safetensors", "pydantic")


class RunFolder:
    """One run's folder, held by one process at a time.

    Attributes:
        path: the folder.
        url: where the run is kept, if the folder is a working copy.
        shared: whether workers of all nodes read and write it themselves.
        token: in the lock file while this process holds it. Workers read it to check that they see the same folder.
        recipe: path and digest of the files that made the config, by name; for run.json.

    Args:
        path: the folder; made if missing.

    Raises:
        ValueError: the folder cannot be read or written, or another process holds it.
    """

    shared = True
    url: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe: dict[str, dict[str, str]] = {}
        self._changing = threading.Lock()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / LOCK, "a+")  # noqa: SIM115  (stays open while the run lasts: closing unlocks)
        except OSError as error:
            raise ValueError(
                f"{path}: the run folder cannot be written ({error.strerror}); "
                f"make it writable, or choose another with run.dir and run.name"
            ) from error
        # The system releases the lock when this process ends, however it ends: no lock is ever stale.
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = next(iter(self._lock.read().splitlines()), "another process")
            self._lock.close()
            raise ValueError(
                f"{path}: the run is already being carried out by {holder}; wait for it, stop it, or set another "
                f"run.name"
            ) from error
        self.token = uuid.uuid4().hex
        self._lock.truncate(0)  # only now that it is ours: before, it named the holder
        self._lock.write(f"process {os.getpid()} on {platform.node()}\n{self.token}\n")
        self._lock.flush()
        os.fsync(self._lock)  # else NFS may keep the token on this node, and workers on others look for it

    def close(self) -> None:
        """Let another process hold the folder."""
        self._lock.close()

    def announce_checkpoint(self) -> None:
        """Take note of a complete checkpoint. Nothing to do here; a subclass stores it elsewhere."""

    def wait_until_stored(self, wait_s: float | None = None) -> None:
        """Wait until everything written has reached the place where the run is kept; here it has."""

    @property
    def started(self) -> bool:
        """Whether an earlier start trained here. A start that was refused, for its data say, does not count."""
        return has_started(self.path)

    def stored_config(self) -> RunConfig:
        """Read the config that the run was started with.

        Raises:
            ValueError: it cannot be read.
        """
        return from_yaml(self.path / CONFIG)

    def check_same_config(self, config: RunConfig) -> None:
        """Refuse to continue with a config that would give other numbers.

        Raises:
            ValueError: every key that differs, old and new.
        """
        lines = difference(identity(self.stored_config()), identity(config))
        if lines:
            raise ValueError(
                f"{self.path}: this run was started with another config; {len(lines)} "
                f"difference{'s' if len(lines) > 1 else ''} (old -> new)\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\n  give the old values to resume it, or another run.name to start a new run"
            )

    def write_config(self, config: RunConfig) -> None:
        """Store the resolved config, without the password that tracking.uri may hold."""
        uri = None if config.tracking.uri is None else redact(config.tracking.uri)
        kept = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
        write_atomic(self.path / CONFIG, to_yaml(kept))

    def record_start(self, config: RunConfig, hosts: list[dict[str, Any]], shape: dict[str, int]) -> None:
        """Add this start to run.json: command, parameters, versions, host, mesh, files of the recipe."""
        found = {
            "command": _command(),
            "commit": _commit(),
            "config_hash": config_hash(config),
            "parameters": deciding_keys(config),
            "seed": config.seed,
            "resume": config.resume,
            "status": "running",
            "versions": versions(),
            "host": {
                "name": platform.node(),
                "system": platform.platform(),
                "processor": _processor(),
                "cpus": psutil.cpu_count(),
                "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            },
            "folder": {"path": str(self.path), "inode": self.path.stat().st_ino, "url": self.url},
            "mesh": shape,
            "workers": hosts,
            **({"recipe": self.recipe} if self.recipe else {}),
        }
        with self._changing:  # read, change and write: two threads at once would lose the values of one
            run = self.read_run()
            run.setdefault("created", _now())
            over = {name: None for name in ("waits_for", "problem") if name in run}
            self._write_json(RUN, run | found | over | {"starts": run.get("starts", 0) + 1})

    def record_waiting(self, config: RunConfig, awaited: str) -> None:
        """Note that the run waits for places; its workers are not known yet."""
        self.update_run(
            created=self.read_run().get("created", _now()),
            command=_command(),
            config_hash=config_hash(config),
            parameters=deciding_keys(config),
            seed=config.seed,
            status="waiting",
            waits_for=awaited,
        )

    def read_run(self) -> dict[str, Any]:
        """Read run.json; {} before the first start."""
        path = self.path / RUN
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: not readable ({error}); needed the JSON written by this run; restore it, or remove the file "
                f"to have it written again"
            ) from error

    def update_run(self, **values: Any) -> None:
        """Set values in run.json. Any thread may call it."""
        with self._changing:
            self._write_json(RUN, self.read_run() | values)

    def read_data(self) -> dict[str, Any]:
        """Read data.json, the description of the run's dataset."""
        return json.loads((self.path / DATA).read_text())

    def write_data(self, data: dict[str, Any]) -> None:
        """Write data.json, the description of the run's dataset.

        Raises:
            ValueError: an earlier start of this run saw other data.
        """
        path = self.path / DATA
        if path.exists() and self.started:
            old = json.loads(path.read_text())
            if old["digest"] != data["digest"]:
                raise ValueError(
                    f"{path}: this run was started with other data (digest {old['digest'][:12]}, {old['total']} "
                    f"training images; found {data['digest'][:12]}, {data['total']}); put the old data back, or start "
                    f"a run with another run.name"
                )
        self._write_json(DATA, data)

    def write_evaluation(self, name: str, evaluation: dict[str, Any]) -> None:
        """Write evaluation/<name>.json; the name may contain a folder."""
        (self.path / "evaluation" / name).parent.mkdir(parents=True, exist_ok=True)
        self._write_json(f"evaluation/{name}.json", evaluation)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        write_json(self.path / name, value)


def has_started(path: Path) -> bool:
    """Return whether a run was trained in a folder, which another process may hold."""
    journal = path / "metrics.jsonl"
    trained = (journal.exists() and journal.stat().st_size > 0) or any(path.glob("checkpoints/[0-9]*"))
    return trained and (path / CONFIG).exists()


def _command() -> str:
    return redact(shlex.join(["expertail", *sys.argv[1:]]))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def origin(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return commit, versions and hardware of a run, from its run.json; without the name of its host."""
    hardware = {key: run["host"][key] for key in ("processor", "cpus", "memory_gib")}
    return {"commit": run["commit"], "versions": run["versions"], "hardware": hardware}


def origin_name(adopted: Mapping[str, Any]) -> str:
    """Return what a run is called that was taken over: its old folder, with the one above, and the commit."""
    commit = f" ({adopted['commit'][:8]})" if adopted.get("commit") else ""
    return f"{Path(adopted['folder']).name}/{adopted['run']}{commit}"


def versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of the libraries that affect the numbers."""
    found = {"python": platform.python_version(), "expertail": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> str | None:
    """Return the commit this code runs from, with '+' if it has local changes; None for an installed wheel.

    The files that `ray job submit` uploads have no .git: there it is EXPERTAIL_COMMIT, or else the name of the package,
    which is a digest of its files.
    """
    folder = code_root()
    if not (folder / ".git").exists():
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
        return os.environ.get("EXPERTAIL_COMMIT") or (job.get("runtime_env") or {}).get("working_dir")
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _processor() -> str:
    try:  # on Linux `platform.processor` is empty or just "x86_64"
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
