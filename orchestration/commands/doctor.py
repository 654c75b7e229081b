"""`expertail doctor`: compare what a config needs with what this machine and its cluster have. Changes nothing.

Every check is a function that yields findings. A check that raises is a finding too, so the list is always complete.
The nodes of a cluster are checked in preflight/node_checks.py, a tracking store in preflight/tracking_checks.py.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from orchestration.config.paths import code_root
from orchestration.config.secrets import redact
from orchestration.preflight.checks import Finding, nearest_existing, run_check
from orchestration.preflight.tracking_checks import check_tracking
from orchestration.results.text import plural

if TYPE_CHECKING:  # modules that load torch are imported where they are used: a torch that does not load is a finding
    from orchestration.config.recipe import StageConfig
    from orchestration.config.run_config import RunConfig
    from orchestration.training.mesh import MeshShape

_PYTHON = (3, 11)
_TIMEOUT_S = 3.0  # for an answer of the tracking server
_GIB = 2**30
_FREE_GIB = 1.0  # room for checkpoints, exports and the journal

Check = Callable[["RunConfig"], Iterator[Finding]]


def examine(overrides: list[str]) -> tuple[str, bool]:
    """Check this machine, and the cluster, data and tracking store that a config names.

    Args:
        overrides: as for training.

    Returns:
        One line per finding, and True if none of them is a FAIL. Nothing is raised.
    """
    findings = [*run_check("python", _python), *run_check("libraries", _libraries)]
    try:
        from orchestration.config.compose import load_config

        config = load_config(overrides)
    except Exception as error:  # whatever it is, it belongs on the list
        findings.append(Finding("FAIL", "config", str(error)))
        findings.append(Finding("warn", "config", "without it, cluster, folders, tracking and data were not checked"))
    else:
        title = f"{config.method.name} on {config.dataset.name}, run {config.run_name}"
        findings.append(Finding("ok", "config", title))
        for name, check in CHECKS.items():
            findings += run_check(name, lambda check=check: check(config))  # type: ignore[misc]
    return _report(findings), all(finding.state != "FAIL" for finding in findings)


def _report(findings: list[Finding]) -> str:
    # Columns for state and subject; further lines of a text are indented below its first.
    width = max(len(finding.what) for finding in findings)
    indent = "\n" + " " * (width + 8)
    lines = [f"{f.state:<4}  {f.what:<{width}}  {f.text.replace(chr(10), indent)}" for f in findings]
    failures = sum(finding.state == "FAIL" for finding in findings)
    warnings = sum(finding.state == "warn" for finding in findings)
    verdict = "ready" if not failures else "not ready"
    return "\n".join([*lines, f"{verdict}: {plural(failures, 'failure')}, {plural(warnings, 'warning')}"])


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= _PYTHON:
        yield Finding("ok", "python", found)
    else:
        yield Finding(
            "FAIL", "python", f"found {found}; needed 3.11 or later; create the environment with a newer Python"
        )


def _libraries() -> Iterator[Finding]:
    """Compare the installed versions with those that this project needs, and torch with torchvision."""
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
    except importlib.metadata.PackageNotFoundError:  # this checkout is not installed
        with open(code_root() / "pyproject.toml", "rb") as file:
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
            f"release and one index (both CPU or both CUDA); reinstall both from the same index",
        )
        return
    yield Finding("ok", "torch", f"torch {torch.__version__} and torchvision {torchvision.__version__} load together")


def _gpus(config: RunConfig) -> Iterator[Finding]:
    import torch

    found = torch.cuda.device_count()
    wanted = config.cluster.gpus_per_worker * config.cluster.workers
    text = f"{plural(found, 'GPU')} on this machine, {wanted} needed"
    if not wanted:
        yield Finding("ok", "gpus", text)
    elif config.cluster.named_address:
        state = "ok" if found else "warn"
        hint = "" if found else "; this torch finds none, which is right only on a head node without GPUs"
        yield Finding(state, "gpus", text + hint)
    elif found < wanted:
        yield Finding(
            "FAIL", "gpus", f"{text}; install a CUDA build of torch, name a cluster, or set cluster.gpus_per_worker=0"
        )
    else:
        yield Finding("ok", "gpus", text)


def _autocast(config: RunConfig) -> Iterator[Finding]:
    """Measure what autocast would give, if the run computes on this machine's CPU."""
    if config.cluster.named_address or config.cluster.gpus_per_worker:
        return
    from orchestration.preflight.autocast import autocast_line

    without = "this CPU has neither AMX nor AVX512-BF16: engine.precision=autocast would not be faster here"
    yield Finding("ok", "autocast", autocast_line() or without)


def _memory(config: RunConfig) -> Iterator[Finding]:
    if config.cluster.named_address:
        return  # workers run on the cluster, whose nodes are asked
    from experts.data.loader_room import room_here
    from orchestration.preflight.plan import WORKER_GIB

    total, free = room_here().memory
    text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free on this machine"
    needed = WORKER_GIB[1] * config.cluster.workers
    if free < needed * _GIB:
        yield Finding("warn", "memory", f"{text}; needed about {needed:g} GiB for {config.cluster.workers} workers; "
                                        f"use fewer workers, or free some memory")  # fmt: skip
    else:
        yield Finding("ok", "memory", f"{text}, about {needed:g} GiB needed")


def _loaders(config: RunConfig) -> Iterator[Finding]:
    """Look for what loader processes of all workers need on this machine."""
    from experts.data.loader_room import missing_room
    from orchestration.training.mesh import mesh_shape

    data, workers = config.dataset, config.cluster.workers
    if config.cluster.named_address or not data.loader_processes:
        return
    if streams := _decoded(config, mesh_shape(config.method.num_experts, workers)):
        lacking = missing_room(data.loader_processes, streams, data.image_size, workers=workers)
        room = f"{data.loader_processes} of each worker have memory, shared memory and open files"
        yield Finding("FAIL" if lacking else "ok", "loaders", lacking or room)


def _run_dir(config: RunConfig) -> Iterator[Finding]:
    from orchestration.config.paths import expand
    from orchestration.storage.url_store import check_access, check_url, is_url

    key, folder = "run.dir", config.run.dir
    if is_url(folder):
        check_url(folder)
        check_access(folder)
        yield Finding("ok", "run.dir", f"{folder}: a file was written, read and removed")
        key, folder = "run.local_dir", config.run.local_dir

    place = expand(folder)
    there = nearest_existing(place.absolute())
    advice = f"choose another with {key}"
    if not there.is_dir():
        yield Finding("FAIL", key, f"{place}: {there} is a file; needed a folder; {advice}")
        return
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Finding("FAIL", key, f"{place}: {there} cannot be written ({error.strerror}); {advice}")
        return

    free = shutil.disk_usage(there).free / _GIB
    text = f"{place}: writable, {free:.1f} GiB free"
    if free < _FREE_GIB:
        yield Finding("warn", key, f"{text}; needed {_FREE_GIB:g} GiB or more; make room, or {advice}")
    else:
        yield Finding("ok", key, text)


def _cluster(config: RunConfig) -> Iterator[Finding]:
    """Compare the placement with the cluster that the config names, which must answer, or else with this machine."""
    from experts.data.cpus import usable_cpus
    from orchestration.cluster.placement import shape_of

    wanted = config.cluster
    shape = shape_of(config.method.num_experts, wanted)
    sizes = (plural(shape.workers, "worker"), plural(shape.slots, "expert slot"), plural(shape.replicas, "replica"))
    yield Finding("ok", "mesh", "{} = {} x {}".format(*sizes))

    from orchestration.cluster.connection import cluster
    from orchestration.cluster.placement import largest_share

    address = config.cluster.named_address
    if address:
        with cluster(address):
            yield from _connected(config, shape, address)
        return

    import torch

    have = {"CPU": float(usable_cpus()), "GPU": float(torch.cuda.device_count())}
    have["memory"] = float(psutil.virtual_memory().available)
    cpus = wanted.cpus_per_worker or largest_share(shape.workers * config.side_by_side, [have["CPU"]])
    threads = config.engine.threads or max(1, int(cpus))
    yield from _fits(config, shape, cpus, threads, {"this machine": have}, "our own Ray on this machine")


def _connected(config: RunConfig, shape: MeshShape, address: str) -> Iterator[Finding]:
    """Compare the placement with the cluster's resources, and its nodes with what the run needs."""
    from orchestration.cluster.connection import node_resources, resolve_resources
    from orchestration.cluster.placement import bundle_of, pack
    from orchestration.config.paths import expand
    from orchestration.preflight.node_checks import Needs, check_nodes
    from orchestration.storage.location import check_run_dir
    from orchestration.storage.url_store import is_url

    nodes = node_resources()
    cpus, threads = resolve_resources(config.cluster, config.engine, shape.workers * config.side_by_side)
    yield from _fits(config, shape, cpus, threads, nodes, f"Ray at {redact(address)}")
    try:
        check_run_dir(config, len(nodes))
    except ValueError as problem:
        yield Finding("FAIL", "run.dir", str(problem))

    # As many stages side by side as the run would train; where they do not fit, they wait for each other.
    bundle = bundle_of(config.cluster, cpus)
    placement = pack(shape.workers * config.side_by_side, bundle, nodes) or pack(shape.workers, bundle, nodes)
    run_dir = None if is_url(config.run.dir) else Path(os.path.abspath(expand(config.run.dir)))
    yield from check_nodes(Needs(config, placement, run_dir, _weights(config), _decoded(config, shape)))


def _fits(
    config: RunConfig, shape: MeshShape, cpus: float, threads: int, nodes: dict[str, dict[str, float]], where: str
) -> Iterator[Finding]:
    from orchestration.cluster.placement import bundle_of, check_fits

    cluster = config.cluster
    total = {kind: sum(node.get(kind, 0) for node in nodes.values()) for kind in ("CPU", "GPU")}
    try:
        check_fits(shape.workers, bundle_of(cluster, cpus), nodes)
    except ValueError as problem:
        yield Finding("FAIL", "cluster", str(problem))
        return
    yield Finding(
        "ok",
        "cluster",
        f"{where}: {plural(len(nodes), 'node')}, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs; "
        f"needed {shape.workers} x ({cpus:.3g} CPUs, {cluster.gpus_per_worker} GPUs), {plural(threads, 'thread')} each",
    )


def _weights(config: RunConfig) -> int | None:
    from orchestration.preflight.plan import plan

    try:
        return plan(config).memory
    except ValueError:  # another check reports what is wrong with data or teachers
        return None


def _decoded(config: RunConfig, shape: MeshShape) -> list[int]:
    """Return the images that a worker reads at once for each stream of batches, where it reads most."""
    from orchestration.preflight.expected_data import FILES

    if config.dataset.source not in FILES:
        return []
    scored = config.evaluation_batch_size("cuda" if config.cluster.gpus_per_worker else "cpu")
    in_steps = (_in_step(config, stage, shape.replicas) for stage in config.method.stages.values() if stage.batch_size)
    return max([scored], *in_steps, key=sum)


def _in_step(config: RunConfig, stage: StageConfig, replicas: int) -> list[int]:
    """Return the images that each replica reads for a step, for both streams where a stage has partners."""
    from experts.augmentation.stack import Stack
    from experts.batches import crops_of, images_of_a_step

    assert stage.batch_size is not None
    alone = stage.mixing is None or stage.mixing.second_sampler is not None
    images, augment = images_of_a_step(stage.batch_size, replicas, alone=alone), stage.augment or config.dataset.augment
    views = [images * crops_of([Stack.of(config.dataset, one) for one in (augment, *stage.views)])]
    if stage.partner_sampler is None:
        return views
    share = images_of_a_step(stage.batch_size, replicas, alone=True)
    return [*views, share * crops_of([Stack.of(config.dataset, augment)])]


def _tracking(config: RunConfig) -> Iterator[Finding]:
    return check_tracking(config, _TIMEOUT_S)


def _data(config: RunConfig) -> Iterator[Finding]:
    """Look for the data on this machine. With a cluster it is only needed on the workers' nodes."""
    if not config.cluster.named_address:
        yield from _data_here(config)
        return
    try:
        yield from _data_here(config)
    except ValueError as problem:
        yield Finding("warn", "data", f"not on this machine, where only the driver runs: {problem}")


def _data_here(config: RunConfig) -> Iterator[Finding]:
    """Open sets of arrays, which takes seconds at most; of sets of files, count them all and decode none."""
    import numpy as np

    from experts.data.dataset import open_dataset
    from experts.data.download import require_root
    from experts.data.readers import open_raw
    from experts.data.splits import choose_splits
    from orchestration.preflight.expected_data import FILES

    data = config.dataset
    what = data.name
    if data.download:
        root = require_root(data, "")
        data = data.model_copy(update={"download": False, "root": root})  # the doctor downloads nothing
        try:
            open_raw(data)
        except ValueError as problem:
            yield Finding("warn", "data", f"{what}: will be downloaded into {root} when the run starts ({problem})")
            return

    if data.source in FILES:
        raw = open_raw(data)
        chosen = choose_splits(data, raw)
        counts = np.bincount(chosen.train.labels, minlength=len(raw.class_names))
        test_images, remarks = len(chosen.test.labels), (*raw.remarks, *chosen.remarks)
    else:
        opened = open_dataset(data)
        counts, test_images, remarks = opened.counts_C, len(opened.test.labels), opened.remarks
    yield Finding(
        "ok",
        "data",
        f"{what}: {counts.sum():,} training images of {len(counts):,} classes, {counts.max():,} to "
        f"{counts.min():,} per class; {test_images:,} test images",
    )
    yield from (Finding("warn" if remark.doubt else "ok", "data", remark.text) for remark in remarks)


CHECKS: dict[str, Check] = {
    "gpus": _gpus,
    "autocast": _autocast,
    "memory": _memory,
    "loaders": _loaders,
    "cluster": _cluster,
    "run.dir": _run_dir,
    "tracking": _tracking,
    "data": _data,
}
