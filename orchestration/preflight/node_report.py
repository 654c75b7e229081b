"""The report of one cluster node to the doctor. Runs on that node and imports little before it is asked.

Every entry is found out on its own: one that fails is None or an error message, and the rest is still reported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray

from experts.data.loader_room import room_here
from orchestration.cluster.ray_internals import token_needed
from orchestration.cluster.sending import carries_anything
from orchestration.config.paths import code_root

LIBRARIES = ("ray", "torch", "torchvision", "deepspeed", "numpy")
_START_BYTES = 2**20  # of a data file, compared between nodes
_CONNECT_S = 3.0  # to connect, and as long again for the answer
_CONNECTING_S = 12.0  # no connection is opened later: the doctor waits 20 s for all of them
_THREADS = 64  # connections at once
_RAY_PROCESSES = {
    "gcs_server": "the cluster's control service",
    "raylet": "raylet",
    "dashboard.py": "dashboard",
    "ray.util.client.server": "Ray Client server",
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime environment agent",
}


@ray.remote(num_cpus=0, max_restarts=0)
@carries_anything
class NodeReporter:
    """Answers the doctor's questions on one node."""

    def report(self, data: dict[str, Any]) -> dict[str, Any]:
        """See `report`."""
        return report(data)

    def clock(self) -> float:
        """Return this node's time, unix seconds."""
        return time.time()

    def share(self, folder: str, nonce: str, node_id: str) -> str | None:
        """Read the nonce from a folder and write it there under this node's name. Returns the problem, if any."""
        try:
            if Path(folder, "asked").read_text() != nonce:
                return "another folder lies at the same path"
            Path(folder, node_id).write_text(nonce)
        except OSError as error:
            return f"{error.strerror}: {error.filename}"
        return None

    def listen(self, nonce: str) -> tuple[str, int]:
        """Send the nonce to everyone who connects to a free port of this node. Returns address and port."""
        # The address by which Ray knows the node, since workers of a run connect to it, too.
        address = ray.util.get_node_ip_address()
        server = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        threading.Thread(target=serve_nonce, args=(server, nonce.encode()), daemon=True).start()
        return server.getsockname()[:2]

    def connect(self, others: dict[str, tuple[str, int]], nonce: str) -> tuple[dict[str, str], list[str]]:
        """See `connect_all`."""
        return connect_all(others, nonce.encode())


def report(data: dict[str, Any]) -> dict[str, Any]:
    """Report libraries, memory and network of this node, and the data of a config as this node sees it.

    Args:
        data: a `DatasetConfig` as plain values.
    """
    system = {"room": _or_problem(room), "listening": _or_problem(listening), "token": _or_problem(token_needed)}
    return software() | system | {"data": _or_problem(data_digests, data)}


def connect_all(others: Mapping[str, tuple[str, int]], nonce: bytes) -> tuple[dict[str, str], list[str]]:
    """Connect to other nodes and check their answers.

    Args:
        others: address and port by node.
        nonce: the right answer.

    Returns:
        Problems by node, and the nodes that were not tried for lack of time.
    """
    end = time.monotonic() + _CONNECTING_S
    untried: list[str] = []

    def connect(node: str) -> str | None:
        if time.monotonic() < end:
            return _connect(others[node], nonce)
        untried.append(node)
        return None

    with ThreadPoolExecutor(max_workers=_THREADS) as threads:
        problems = dict(zip(others, threads.map(connect, others), strict=True))
    return {node: problem for node, problem in problems.items() if problem}, sorted(untried)


def serve_nonce(server: socket.socket, nonce: bytes) -> None:
    """Send the nonce to everyone who connects, until the server is shut down."""
    with contextlib.suppress(OSError):  # `accept` of a server that was shut down
        while True:
            caller, _ = server.accept()
            with caller, contextlib.suppress(OSError):  # one caller that hangs up must not end it for the others
                caller.sendall(nonce)


def _connect(address: tuple[str, int], nonce: bytes) -> str | None:
    try:
        with socket.create_connection(address, timeout=_CONNECT_S) as connection:
            answer = connection.recv(len(nonce), socket.MSG_WAITALL)
    except OSError as error:
        return str(error)
    return None if answer == nonce else "something else answers there"


def _or_problem(find_out: Callable[..., Any], *args: Any) -> Any:
    try:
        return find_out(*args)
    except Exception as error:  # whatever it is, the other entries are still worth reporting
        return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)


def software() -> dict[str, Any]:
    """Return versions, processor architecture and what decides the last bits of a result."""
    from orchestration import __version__

    libraries = {name: _version(name) for name in LIBRARIES}
    return {
        "versions": {"python": platform.python_version(), "expertail": __version__, **libraries},
        "code": _or_problem(code_digest),
        "machine": platform.machine(),
        "torch": _or_problem(_torch),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _torch() -> dict[str, Any]:
    import torch

    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "cuda": torch.version.cuda,
        "arithmetic": f"{torch.backends.cpu.get_cpu_capability()}, BLAS {blas[1] if blas else 'unknown'}",
    }


def code_digest() -> str:
    """Return twelve hexadecimal digits of our own code and configs: two checkouts may differ within one version."""
    root = code_root()
    digest = hashlib.sha256()
    for package in ("experts", "aggregation", "orchestration", "configs"):
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def room() -> dict[str, Any]:
    """Return the memory that processes of this node can have, its shared memory, bytes, and its limit of open files."""
    here = room_here()
    shm, shm_free = here.shared_memory or (None, None)
    return {"memory": here.memory[0], "memory_free": here.memory[1], "shm": shm, "shm_free": shm_free,
            "open_files": here.open_files}  # fmt: skip


def listening() -> list[tuple[str, str, int]]:
    """Return the ports that this node's Ray processes listen on: process, address, port."""
    # A machine may run several Rays, e.g. of other users. Ours are the processes that name this node, the children of
    # our raylet, which is our parent, and the dashboard of the same session.
    node_id = ray.get_runtime_context().get_node_id()
    session = re.search(r"session_[\w-]+", " ".join(psutil.Process(os.getppid()).cmdline()))
    found = set()
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = " ".join(process.info["cmdline"] or ())
        kind = next((name for part, name in _RAY_PROCESSES.items() if part in words.split(" --")[0]), None)
        of_dashboard = kind == "dashboard" and session is not None and session[0] in words
        if kind is None or not (of_dashboard or node_id in words or process.info["ppid"] == os.getppid()):
            continue
        try:
            open_ = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        host = re.search(r"--host=(\S+)", words) if of_dashboard else None  # leaves out its port for metrics
        found |= {
            (kind, c.laddr.ip, c.laddr.port)
            for c in open_
            if c.status == psutil.CONN_LISTEN and (host is None or c.laddr.ip == host[1])
        }
    return sorted(found)


def data_digests(data: dict[str, Any]) -> dict[str, str]:
    """Return the size and a digest of each file of a data set: of its beginning, or of a whole list.

    Raises:
        ValueError: the folder or a list is missing, or nothing in the folder belongs to the set.
    """
    from experts.data.config import DatasetConfig
    from experts.data.download import require_root

    config = DatasetConfig.model_validate(data)
    if config.source == "digits":
        return {}
    root = require_root(config, "the files of the set")
    found = {name: _digest(path) for name, path in _files(config, root) if path.is_file()}
    if config.source == "image_folder":
        found |= _class_folders(Path(root))
    if not found and not config.download:
        raise ValueError(
            f"dataset.root = {config.root}: found no file of {config.name}; needed its folder; it may be one level too "
            f"high or too low"
        )
    return found


def _files(config: Any, root: str) -> Iterator[tuple[str, Path]]:
    """Yield the files that a set may have, each with a name that does not depend on root."""
    if config.source == "fashion_mnist":
        from experts.data.arrays import FASHION_FILES

        names = [f"{folder}{name}{end}" for folder in ("", "FashionMNIST/raw/") for name in FASHION_FILES
                 for end in ("", ".gz")]  # fmt: skip
    elif config.source in ("cifar10", "cifar100"):
        from experts.data.cifar import LAYOUTS

        layout = LAYOUTS[config.source]
        files = layout.train + layout.test
        names = [f"{folder}{name}" for folder in (f"{layout.python_folder}/", "") for name in files]
        names += [f"{folder}{name}.bin" for folder in (f"{layout.binary_folder}/", "") for name in files]
    elif config.source == "image_list":
        yield from _lists(config, root)
        return
    else:
        return
    yield from ((name, Path(root, name)) for name in names)


def _lists(config: Any, root: str) -> Iterator[tuple[str, Path]]:
    """Yield the lists, and the first and last image of each.

    Raises:
        ValueError: a list or one of those images is missing.
    """
    from experts.data.lists import LISTS, read_list

    for key in LISTS:
        value = getattr(config, key)
        if value is None:
            continue
        found = read_list(root, key, value)
        yield f"dataset.{key}", Path(found.file)

        # The first and the last image show whether dataset.root is the folder that the list means.
        for raw in dict.fromkeys([found.paths[0], found.paths[-1]]):
            image = os.fsdecode(raw)
            if not Path(root, image).is_file():
                raise ValueError(f"dataset.root = {root}: {image}, listed in {found.file}, is missing")
            yield image, Path(root, image)


def _class_folders(root: Path) -> dict[str, str]:
    """Return digests of the class folders' names, and of the first image of the first and of the last class."""
    from experts.data.files import class_folders, split_folders

    found = {}
    # Without split folders the classes lie in the root itself, which the empty name stands for.
    for split in split_folders(str(root)).values() or [""]:
        classes = class_folders(str(root / split))
        if not classes:
            raise ValueError(f"dataset.root = {root}: no class folder in {split or 'it'}; needed one per class")

        # Names are compared as one digest, and only two images are read: a tree may have thousands and millions.
        names = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape")).hexdigest()[:12]
        found[f"class folders of {split or 'root'}"] = f"{len(classes)} {names}"
        for name in classes[:1] + classes[1:][-1:]:
            images = sorted(entry.name for entry in os.scandir(root / split / name) if entry.is_file())
            found[f"{split}/{name}"] = f"{len(images)} files"
            if images:
                found[f"{split}/{name}/{images[0]}"] = _digest(root / split / name / images[0])
    return found


def _digest(path: Path) -> str:
    """Return size in bytes and a digest: of a whole list, or of the first MiB of another file."""
    # A data file may have gigabytes; another copy or another version differs in size or at the beginning.
    with open(path, "rb") as file:
        start = file.read() if path.suffix == ".txt" else file.read(_START_BYTES)
    return f"{path.stat().st_size} {hashlib.sha256(start).hexdigest()[:12]}"
