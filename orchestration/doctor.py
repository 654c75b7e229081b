"""The doctor command: what a config needs, against what this machine and its cluster have. Looks, and changes nothing.

Every check is a function that yields findings. One that fails to look is a finding itself, so the list is always whole.
"""

from __future__ import annotations

import base64
import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

import psutil

from orchestration.tracking_contents import check_uri, default_uri, redact, sqlite_path

if TYPE_CHECKING:  # what loads torch is imported where it is used: a torch that does not load is a finding
    from orchestration.config import RunConfig

_PYTHON = (3, 11)
_PATIENCE_S = 3.0  # for anything on a network
_GIB = 2**30
_WORKER_GIB = 1.5  # resident memory of a worker on a small data set
_FREE_GIB = 1.0  # room for checkpoints, exports and the journal


@dataclass(frozen=True)
class Finding:
    """What one check found. `state` is "ok", "warn" (a run may still work) or "FAIL" (it cannot, or not as asked)."""

    state: str
    what: str
    text: str


Check = Callable[["RunConfig"], Iterator[Finding]]


def examine(overrides: list[str]) -> tuple[str, bool]:
    """Check this machine, and the cluster, data and tracking store that a config names.

    Args:
        overrides: as for training.

    Returns:
        One line per finding, and whether none of them is a FAIL. Nothing is raised.
    """
    findings = [*_guard("python", _python), *_guard("libraries", _libraries)]
    try:
        from orchestration.compose import load_config

        config = load_config(overrides)
    except Exception as error:  # whatever it is, it belongs in the list
        findings.append(Finding("FAIL", "config", str(error)))
        findings.append(Finding("warn", "config", "cluster, folders, tracking and data were not checked without it"))
    else:
        title = f"{config.method.name} on {config.dataset.name}, run {config.run_name}"
        findings.append(Finding("ok", "config", title))
        for name, check in CHECKS.items():
            findings += _guard(name, lambda check=check: check(config))  # type: ignore[misc]
    width = max(len(finding.what) for finding in findings)
    indent = "\n" + " " * (width + 8)
    lines = [f"{f.state:<4}  {f.what:<{width}}  {f.text.replace(chr(10), indent)}" for f in findings]
    failures = sum(finding.state == "FAIL" for finding in findings)
    warnings = sum(finding.state == "warn" for finding in findings)
    verdict = "ready" if not failures else "not ready"
    lines.append(f"{verdict}: {_many(failures, 'failure')}, {_many(warnings, 'warning')}")
    return "\n".join(lines), not failures


def _guard(what: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:
        text = redact(str(error).strip()) or "no message"
        found.append(
            Finding("FAIL", what, text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")
        )
    return found


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= _PYTHON:
        yield Finding("ok", "python", found)
    else:
        yield Finding(
            "FAIL", "python", f"found {found}; needed 3.11 or later; make the environment with a newer Python"
        )


def _libraries() -> Iterator[Finding]:
    """Installed versions against what this project asks for, and torch against torchvision."""
    from packaging.requirements import Requirement

    good = []
    for line in _requirements():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        advice = f"needed {needed.specifier or 'any'}; make setup, or pip install '{line}'"
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", "libraries", f"{needed.name}: not installed; {advice}")
            continue
        if needed.specifier.contains(found, prereleases=True):
            good.append(f"{needed.name} {found}")
        else:
            yield Finding("FAIL", "libraries", f"{needed.name}: found {found}; {advice}")
    yield Finding("ok", "libraries", ", ".join(good))
    yield from _torch_pair()


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("expertail") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        with open(Path(__file__).resolve().parent.parent / "pyproject.toml", "rb") as file:
            return tomllib.load(file)["project"]["dependencies"]


def _torch_pair() -> Iterator[Finding]:
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        yield Finding(
            "FAIL",
            "torch",
            f"torch and torchvision cannot be loaded together ({str(error).splitlines()[0]}); needed builds of one "
            f"release and one index (both CPU or both CUDA); install both again from the same index",
        )
        return
    yield Finding("ok", "torch", f"torch {torch.__version__} and torchvision {torchvision.__version__} load together")


def _gpus(config: RunConfig) -> Iterator[Finding]:
    import torch

    found = torch.cuda.device_count()
    wanted = config.cluster.gpus_per_worker * config.cluster.workers
    text = f"{_many(found, 'GPU')} on this machine, {wanted} wanted"
    if not wanted:
        yield Finding("ok", "gpus", text)
    elif _address(config):
        state = "ok" if found else "warn"
        hint = "" if found else "; this torch finds none, which is right for a head node without GPUs only"
        yield Finding(state, "gpus", text + hint)
    elif found < wanted:
        yield Finding(
            "FAIL", "gpus", f"{text}; install a CUDA build of torch, name a cluster, or set cluster.gpus_per_worker=0"
        )
    else:
        yield Finding("ok", "gpus", text)


def _memory(config: RunConfig) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free on this machine"
    needed = _WORKER_GIB * config.cluster.workers
    if _address(config):
        yield Finding("ok", "memory", f"{text}; workers live on the cluster, about {_WORKER_GIB} GiB each")
    elif memory.available < needed * _GIB:
        yield Finding("warn", "memory", f"{text}; needed about {needed:g} GiB for {config.cluster.workers} workers; "
                                        f"use fewer workers, or free some")  # fmt: skip
    else:
        yield Finding("ok", "memory", f"{text}, about {needed:g} GiB wanted")


def _run_dir(config: RunConfig) -> Iterator[Finding]:
    from orchestration.compose import expand

    place = expand(config.run.dir)
    there = _existing(place.absolute())
    advice = "choose another with run.dir"
    if not there.is_dir():
        yield Finding("FAIL", "run.dir", f"{place}: {there} is a file; needed a folder; {advice}")
        return
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Finding("FAIL", "run.dir", f"{place}: {there} cannot be written ({error.strerror}); {advice}")
        return
    free = shutil.disk_usage(there).free / _GIB
    text = f"{place}: writable, {free:.1f} GiB free"
    if free < _FREE_GIB:
        yield Finding("warn", "run.dir", f"{text}; needed {_FREE_GIB:g} GiB or more; make room, or {advice}")
    else:
        yield Finding("ok", "run.dir", text)
    if _address(config) and not place.is_absolute():
        yield Finding(
            "warn",
            "run.dir",
            f"{place} is relative, and workers of a cluster may start in another folder; needed an absolute path on "
            f"storage that all nodes share; set run.dir=/...",
        )


def _cluster(config: RunConfig) -> Iterator[Finding]:
    """The placement against what there is. An address that is named must answer; else this machine is looked at."""
    from experts.data.stores import usable_cpus
    from orchestration.mesh import mesh_shape

    wanted = config.cluster
    shape = mesh_shape(config.method.num_experts, wanted.workers, wanted.experts_per_worker)
    yield Finding("ok", "mesh", f"{shape.workers} workers = {shape.slots} expert slots x {shape.replicas} replicas")
    from orchestration import fleet

    address = _address(config)
    if address:
        _knock(address)
        with fleet.cluster(address):
            nodes = fleet.node_resources()
            cpus, threads = fleet.resolve_resources(wanted, config.engine, shape.workers)
        where = f"Ray at {redact(address)}"
    else:
        import torch

        have = {"CPU": float(usable_cpus()), "GPU": float(torch.cuda.device_count())}
        nodes = {"this machine": have}
        cpus = wanted.cpus_per_worker or fleet.largest_share(shape.workers, [have["CPU"]])
        threads = config.engine.threads or max(1, int(cpus))
        where = "a Ray of its own on this machine"
    fleet.check_fits(shape.workers, cpus, wanted.gpus_per_worker, nodes)
    total = {kind: sum(node.get(kind, 0) for node in nodes.values()) for kind in ("CPU", "GPU")}
    yield Finding(
        "ok",
        "cluster",
        f"{where}: {_many(len(nodes), 'node')}, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs; wanted {shape.workers} x "
        f"({cpus:.3g} CPUs, {wanted.gpus_per_worker} GPUs), {_many(threads, 'thread')} each",
    )
    if len(nodes) > 1:
        text = f"{len(nodes)} nodes: run.dir and dataset.root must be on storage that all of them share; not checked"
        yield Finding("warn", "storage", text)


def _address(config: RunConfig) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def _knock(address: str) -> None:
    """Ray itself waits a minute for an address that nobody answers.

    Raises:
        ValueError: nothing listens there.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        return  # 'auto', 'local'
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=_PATIENCE_S).close()
    except OSError as error:
        raise ValueError(
            f"cluster.address = {redact(address)}: nothing answers there ({error}); start Ray with `ray start --head`, "
            f"correct the address or RAY_ADDRESS, or unset it to run on this machine alone"
        ) from error


def _tracking(config: RunConfig) -> Iterator[Finding]:
    from orchestration.compose import expand

    if not config.tracking.enabled:
        yield Finding("ok", "tracking", "off; `expertail sync RUN` can upload later")
        return
    uri = check_uri(config.tracking.uri or default_uri(expand(config.run.dir)))
    database = sqlite_path(uri)
    later = "training goes on without it and `expertail sync RUN` uploads later"
    if database is not None:
        yield _sqlite(database)
    elif uri.startswith(("http://", "https://")):
        problem = _ask(uri)
        if problem is None:
            yield Finding("ok", "tracking", f"{redact(uri)} answers")
        else:
            yield Finding(
                "FAIL",
                "tracking",
                f"tracking.uri = {redact(uri)}: {problem}; needed an MLflow server; start it, correct the URI, or set "
                f"tracking.enabled=false ({later})",
            )
    else:
        yield Finding("warn", "tracking", f"{redact(uri)}: stores of this kind are not checked; {later}")


def _sqlite(path: Path) -> Finding:
    there = _existing(path)
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(16)
        if start and start != b"SQLite format 3\x00":
            text = f"tracking.uri: {path} is not a SQLite file; needed one, or a path where one can be made"
            return Finding("FAIL", "tracking", text)
    if (path.exists() and not path.is_file()) or not os.access(there, os.W_OK):
        text = f"tracking.uri: {path} cannot be written; make it writable, or choose another with tracking.uri"
        return Finding("FAIL", "tracking", text)
    return Finding("ok", "tracking", f"SQLite file {path}{'' if path.exists() else ', to be made'}")


def _ask(uri: str) -> str | None:
    """Ask an MLflow server whether it is well. Returns what is wrong, in words."""
    parts = urlsplit(uri)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + "/health", query="")
    request = urllib.request.Request(urlunsplit(bare))
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    elif token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE_S):
            return None
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"it refuses us ({error.code}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f"it answers {error.code} to /health"
    except (OSError, ValueError) as error:
        return f"no answer ({getattr(error, 'reason', error)})"


def _data(config: RunConfig) -> Iterator[Finding]:
    """Array sets are opened whole, which takes seconds at most; of files only the first are looked for."""
    from experts.data.dataset import open_dataset
    from experts.data.download import needs_root
    from experts.data.sources import open_source

    data = config.dataset
    what = data.name
    if data.download:
        root = needs_root(data, "")
        data = data.model_copy(update={"download": False, "root": root})
        try:
            open_source(data)
        except ValueError as problem:
            yield Finding("warn", "data", f"{what}: to be downloaded into {root} when the run starts ({problem})")
            return
    if data.source == "image_folder":
        yield Finding("ok", "data", _image_folder(needs_root(data, "a folder with train/<class>/<image>")))
    elif data.source == "image_list":
        source = open_source(data)
        text = (
            f"{what}: lists read, {len(source.train.labels):,} training images of {len(source.class_names):,} classes"
        )
        yield Finding("ok", "data", f"{text}; their first images are there")
    else:
        opened = open_dataset(data)
        counts = opened.counts_C
        yield Finding(
            "ok",
            "data",
            f"{what}: {counts.sum():,} training images of {len(counts):,} classes, {counts.max():,} to "
            f"{counts.min():,} a class; {len(opened.test.labels):,} test images",
        )
    if _address(config) and data.source != "digits":
        yield Finding("warn", "data", "looked at on this machine only; every node needs the same files at dataset.root")


def _image_folder(root: str) -> str:
    """What lies in a tree of class folders, without walking it."""
    base = os.path.join(root, "train") if os.path.isdir(os.path.join(root, "train")) else root
    with os.scandir(base) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(
            f"{base}: found no class folder; needed one folder per class with its images; check dataset.root"
        )
    with os.scandir(os.path.join(base, classes[0])) as entries:
        if next(entries, None) is None:
            raise ValueError(
                f"{os.path.join(base, classes[0])}: class '{classes[0]}' has no image; add some or remove it"
            )
    return f"{base}: {len(classes):,} class folders; images are counted when the run starts"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


CHECKS: dict[str, Check] = {
    "gpus": _gpus,
    "memory": _memory,
    "cluster": _cluster,
    "run.dir": _run_dir,
    "tracking": _tracking,
    "data": _data,
}
