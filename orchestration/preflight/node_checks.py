"""Checks of a cluster's nodes: ask all of them at once, and compare their answers with each other and with the config.

An actor on every node answers (node_report.py). A node that does not answer in time is a finding of its own, and the
others are compared without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from experts.data.loader_room import Room, missing_room
from orchestration.cluster.placement import Placement
from orchestration.cluster.sending import call
from orchestration.config.run_config import RunConfig
from orchestration.preflight.checks import Finding, is_loopback, nearest_existing, run_check
from orchestration.preflight.node_report import NodeReporter, software
from orchestration.preflight.plan import WORKER_GIB
from orchestration.results.text import plural

START_S = 120.0  # until a node has started a process and imported torch
_ANSWER_S = 20.0  # for every later answer
_STORAGE_S = 10.0  # network file systems show new files after some seconds
_CLOCK_S = 5.0
_GIB = 2**30
_SHOWN = 8  # lines of a finding that has one line per node
_DRIVER = "the driver"


@dataclass(frozen=True)
class Needs:
    """The requirements of a run on the nodes.

    Attributes:
        config: validated.
        placement: workers on nodes; None if they do not fit.
        run_dir: absolute; None if run folders are at a URL.
        weights: bytes of weights, gradients, momentum and teachers of a worker; None if unknown.
        decoded: images that a worker reads at once from files, for each stream of batches; none where it reads none.
    """

    config: RunConfig
    placement: Placement | None
    run_dir: Path | None
    weights: int | None
    decoded: list[int]


@dataclass
class Survey:
    """Answers by node.

    Attributes:
        reporters: the actors that answered.
        reports: of `NodeReporter.report`.
        resources: as Ray counts them.
    """

    reporters: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    resources: dict[str, dict[str, float]] = field(default_factory=dict)

    def ask(self, call: Callable[[str, Any], Any], limit_s: float = _ANSWER_S) -> tuple[dict[str, Any], dict[str, str]]:
        """Ask all nodes at once. Returns answers and problems, by node."""
        return _wait_for({name: call(name, reporter) for name, reporter in self.reporters.items()}, limit_s)


def check_nodes(needs: Needs) -> Iterator[Finding]:
    """Compare the nodes of the connected cluster that are alive with each other and with what a run needs."""
    nodes = {f"{n['NodeManagerAddress']}/{n['NodeID'][:6]}": n for n in ray.nodes() if n["Alive"]}
    survey = Survey(resources={name: dict(node["Resources"]) for name, node in nodes.items()})
    # soft=False: an actor that Ray put on another node would answer for the wrong one.
    started = {
        name: NodeReporter.options(  # type: ignore[attr-defined]
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for name, node in nodes.items()
    }
    try:
        # First ask all nodes about themselves; those that do not answer take part in no later check.
        data = needs.config.dataset.model_dump(mode="json")
        begun = time.monotonic()
        survey.reports, problems = _wait_for({name: call(r.report, data) for name, r in started.items()}, START_S)
        survey.reporters = {name: started[name] for name in survey.reports}
        for name, problem in problems.items():
            yield Finding("FAIL", "nodes", f"{name}: {problem}")
        if not survey.reporters:
            return
        yield Finding(
            "ok", "nodes", f"{len(survey.reporters)} of {len(nodes)} answered in {time.monotonic() - begun:.0f} s"
        )

        ids = {name: node["NodeID"] for name, node in nodes.items()}
        checks: dict[str, Callable[[], Iterator[Finding]]] = {
            "versions": lambda: _software(survey, needs, software()),
            "nodes": lambda: _unknowns(survey),
            "memory": lambda: _memory(survey, needs),
            "/dev/shm": lambda: _shared_memory(survey, needs),
            "storage": lambda: _storage(survey, needs.run_dir, ids),
            "data": lambda: _data(survey, needs.config),
            "ports": lambda: _ports(survey),
            "clock": lambda: _clocks(survey),
            "auth": lambda: _exposure(survey),
        }
        for what, check in checks.items():
            yield from run_check(what, check)
    finally:
        for reporter in started.values():
            with contextlib.suppress(RayError, ValueError):
                ray.kill(reporter)


def _wait_for(refs: Mapping[str, Any], limit_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Wait for answers. Returns those that came, and the problems of the other nodes."""
    done, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=limit_s) if refs else ([], [])
    answers, problems = {}, {}
    for name, ref in refs.items():
        if ref not in done:
            problems[name] = (
                f"has not answered for {limit_s:g} s; its raylet may hang, or be unable to start processes; look at "
                f"`ray status` and at raylet.out on the node, or remove the node from the cluster"
            )
            continue
        try:
            answers[name] = ray.get(ref)
        except RayError as error:
            problems[name] = _explain(error)
    return answers, problems


def _explain(error: RayError) -> str:
    # Ray wraps an error of the actor in a traceback; the last line says what happened, unless an import failed.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = next((line for line in reversed(lines) if "No module named" in line), None)
    if missing is not None:
        return (
            f"expertail cannot be loaded there ({missing}); install the same version on every node, or launch with "
            f"`ray job submit --working-dir .`"
        )
    return f"its report failed ({lines[-1] if lines else type(error).__name__})"


def _unknowns(survey: Survey) -> Iterator[Finding]:
    """Report what a node could not find out about itself; the comparisons leave it out."""
    for name, report in survey.reports.items():
        for key, what, words in (("room", "memory", "memory and /dev/shm"), ("token", "auth", "Ray's authentication")):
            if isinstance(report[key], str):
                yield Finding(
                    "warn", what, f"{name}: {words} could not be determined ({report[key]}); check it on that node"
                )


# Versions


def _software(survey: Survey, needs: Needs, here: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that all nodes and the driver run the same code, on the same libraries and processors."""
    everyone = {_DRIVER: here, **survey.reports}
    same = True
    for what in [name for name in here["versions"] if name != "python"]:
        problem = _difference({who: report["versions"].get(what, "none") for who, report in everyone.items()})
        if problem:
            same = False
            yield Finding("FAIL", "versions", f"{what}: {problem}; needed one version; install the same everywhere")
    problem = _difference({who: report["code"] for who, report in everyone.items()})
    if problem:
        same = False
        text = f"the code of expertail differs: {problem}; needed the same checkout or wheel on all of them"
        yield Finding("FAIL", "versions", text)
    pythons = {who: report["versions"]["python"] for who, report in everyone.items()}
    if problem := _difference(pythons):
        same = False
        yield Finding("warn", "versions", f"Python: {problem}; Ray needs one version on all nodes")
    if same:
        versions = ", ".join(f"{what} {version}" for what, version in here["versions"].items())
        yield Finding("ok", "versions", f"the same on all nodes and here: {versions}; code {here['code']}")
    yield from _arithmetic(survey, needs)


def _arithmetic(survey: Survey, needs: Needs) -> Iterator[Finding]:
    gpus = needs.config.cluster.gpus_per_worker
    kinds = {}
    for name, report in survey.reports.items():
        found = report["torch"]
        if isinstance(found, str):
            yield Finding("FAIL", "torch", f"{name}: torch cannot be loaded ({found}); reinstall it there")
            continue
        kinds[name] = f"{report['machine']}, {found['arithmetic']}"
        if gpus and survey.resources[name].get("GPU") and found["cuda"] is None:
            text = f"{name}: has GPUs but a CPU build of torch; needed a CUDA build; install one there"
            yield Finding("FAIL", "torch", text)
    if problem := _difference(kinds):
        text = f"processors differ: {problem}; a worker that moves to another kind changes the last bits of a result"
        yield Finding("warn", "torch", text)
    elif kinds:
        yield Finding("ok", "torch", f"{next(iter(kinds.values()))} on every node")


def _difference(values: Mapping[str, str]) -> str | None:
    """Return which value is found on which nodes, or None if all have the same."""
    groups: dict[str, list[str]] = {}
    for who, value in values.items():
        groups.setdefault(value, []).append(who)
    if len(groups) < 2:
        return None
    return "; ".join(f"{value} on {_names(who)}" for value, who in groups.items())


def _names(who: list[str]) -> str:
    return ", ".join(who[:4]) + (f" and {len(who) - 4} more" if len(who) > 4 else "")


# Memory


def worker_gib(config: RunConfig, weights: int | None) -> tuple[float, float]:
    """Return the least and the most memory that a worker's process is likely to hold, GiB."""
    most = (weights or 0) / _GIB
    data = config.dataset
    files = data.source in ("image_folder", "image_list") and data.resident != "never"
    held = 2 * data.resident_mib / 1024 if files else 0.0
    limit = config.cluster.memory_gib_per_worker  # a worker above it is ended, so it never holds more
    return WORKER_GIB[0] + most, limit if limit is not None else WORKER_GIB[1] + most + held


def _memory(survey: Survey, needs: Needs) -> Iterator[Finding]:
    if needs.placement is None:
        yield Finding("warn", "memory", "not compared: the workers do not fit on the nodes")
        return
    low, high = worker_gib(needs.config, needs.weights)
    unknown = "" if needs.weights is not None else "; plus weights, which are not known before the data is opened"
    good = []
    for name, report in survey.reports.items():
        workers = len(needs.placement.on(name))
        room = report["room"]
        if not workers or isinstance(room, str):
            continue
        total, free = room["memory"] / _GIB, room["memory_free"] / _GIB
        text = (
            f"{name}: {plural(workers, 'worker')} of {low:.1f} to {high:.1f} GiB{unknown}; {free:.1f} of "
            f"{total:.1f} GiB free"
        )
        advice = "use fewer workers per node (cluster.cpus_per_worker), cluster.memory_gib_per_worker, or larger nodes"
        # Too little even for the least is certain to fail; too little for the most may do.
        if total < low * workers:
            yield Finding("FAIL", "memory", f"{text}; {advice}")
        elif free < high * workers:
            yield Finding("warn", "memory", f"{text}; {advice}")
        else:
            good.append(text)
    if good:
        yield Finding("ok", "memory", "\n".join(_shorten(good)))


def _shared_memory(survey: Survey, needs: Needs) -> Iterator[Finding]:
    fine = []
    for name, report in survey.reports.items():
        room = report["room"]
        if isinstance(room, str):
            continue
        shm, free = room["shm"], room["shm_free"]
        if shm is None:
            yield Finding("warn", "/dev/shm", f"{name}: there is none, so Ray keeps objects in files, which is slower")
            continue
        store = survey.resources[name].get("object_store_memory", 0.0)
        workers = len(needs.placement.on(name)) if needs.placement else 0
        text = f"{name}: {shm / _GIB:.2g} GiB, {free / _GIB:.2g} free; object store {store / _GIB:.2g} GiB"
        data = needs.config.dataset
        here = Room((room["memory"], room["memory_free"]), (shm, free), room["open_files"])
        if shm < store:
            text += (
                "; needed at least the size of the object store; enlarge it (docker: --shm-size), or start Ray with "
            )
            yield Finding("warn", "/dev/shm", f"{text}--object-store-memory")
        elif lacking := missing_room(data.loader_processes, needs.decoded, data.image_size, here, workers):
            yield Finding("FAIL", "loaders", f"{name}: {lacking}")
        else:
            fine.append(text)
    if fine:
        yield Finding("ok", "/dev/shm", "\n".join(_shorten(fine)))


def _shorten(lines: list[str]) -> list[str]:
    return lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if lines[_SHOWN:] else [])


# Storage and data


def _storage(survey: Survey, run_dir: Path | None, ids: Mapping[str, str]) -> Iterator[Finding]:
    """Write a file beside the runs, let every node read it and write its own, and look for those.

    Nothing is left behind.
    """
    if run_dir is None:
        yield Finding("ok", "storage", "run.dir is a URL: nodes share no folder, and workers send files through Ray")
        return
    there = nearest_existing(run_dir)
    advice = "needed one folder that all nodes share at the same path; mount it everywhere, or choose another run.dir"
    try:
        folder = Path(tempfile.mkdtemp(prefix=".expertail-doctor-", dir=there))
    except OSError as error:
        yield Finding("FAIL", "storage", f"run.dir = {run_dir}: {there} cannot be written here ({error.strerror})")
        return
    try:
        # fsync and a lock, as a run uses them: some network file systems have no locks.
        nonce = secrets.token_hex(16)
        with open(folder / "asked", "w") as file:
            file.write(nonce)
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        answers, problems = survey.ask(lambda name, node: call(node.share, str(folder), nonce, ids[name]))
        problems |= {name: problem for name, problem in answers.items() if problem}

        # A node that read our file has written its own, which must appear here in time.
        left = {name for name, problem in answers.items() if problem is None}
        end = time.monotonic() + _STORAGE_S
        while left and time.monotonic() < end:
            left -= {name for name in left if _contains(folder / ids[name], nonce)}
            time.sleep(0.2 if left else 0)

        missing = f"it reads what is written here, but the file it wrote did not appear here within {_STORAGE_S:g} s"
        problems |= dict.fromkeys(left, missing)
        for name, problem in problems.items():
            yield Finding("FAIL", "storage", f"run.dir = {run_dir}: {name} does not share it ({problem}); {advice}")
        if not problems:
            yield Finding("ok", "storage", f"{there}: {plural(len(answers), 'node')} read and wrote there")
    except OSError as error:
        text = f"run.dir = {run_dir}: files in {there} cannot be written and locked ({error.strerror or error})"
        yield Finding("FAIL", "storage", f"{text}; set run.dir to a folder on a file system with locks")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _contains(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def _data(survey: Survey, config: RunConfig) -> Iterator[Finding]:
    digests = {}
    for name, report in survey.reports.items():
        if isinstance(report["data"], str):
            yield Finding("FAIL", "data", f"{name}: {report['data']}")
        else:
            digests[name] = report["data"]
    if config.dataset.source == "digits":
        yield Finding("ok", "data", "digits: comes with scikit-learn on every node")
        return
    files = sorted({file for files in digests.values() for file in files})
    differ = [
        (file, _difference({name: files.get(file, "missing") for name, files in digests.items()})) for file in files
    ]
    differ = [(file, problem) for file, problem in differ if problem]
    if differ:
        file, problem = differ[0]  # the first is example enough; a wrong mount differs in all of them
        more = f"; and {plural(len(differ) - 1, 'more file')}" if len(differ) > 1 else ""
        text = f"{file} (size, digest): {problem}{more}; needed the same data on every node below dataset.root"
        yield Finding("FAIL", "data", text)
    elif files:
        text = (
            f"{config.dataset.name}: {plural(len(files), 'file')} compared, the same on {plural(len(digests), 'node')}"
        )
        yield Finding("ok", "data", text)
    elif digests:
        yield Finding("warn", "data", f"{config.dataset.name}: will be downloaded on every node when the run starts")


# Network


def _ports(survey: Survey) -> Iterator[Finding]:
    """Connect every node to every other on a free port that the operating system picks, as gloo and NCCL do."""
    if len(survey.reporters) < 2:
        return
    nonce = secrets.token_hex(8)
    ports, problems = survey.ask(lambda name, node: node.listen.remote(nonce))
    for name, problem in problems.items():
        yield Finding("FAIL", "ports", f"{name} cannot open a port at its own address: {problem}")

    def connect(name: str, node: Any) -> Any:
        return node.connect.remote({other: port for other, port in ports.items() if other != name}, nonce)

    answers, silent = survey.ask(connect)
    broken = [f"{name} to {other}: {problem}" for name, (bad, _) in answers.items() for other, problem in bad.items()]
    broken += [f"{name}: {problem}" for name, problem in silent.items()]
    untried = [f"{name}: no time was left to connect to {_names(left)}" for name, (_, left) in answers.items() if left]
    if broken or untried:
        advice = "workers exchange gradients on ports that the system picks; open ports 1024 and above between nodes"
        yield Finding("FAIL", "ports", "\n".join([*_shorten(broken), *_shorten(untried), advice]))
    elif not problems:
        pairs = len(ports) * (len(ports) - 1)
        yield Finding("ok", "ports", f"{pairs} connections between {len(ports)} nodes, each on a free port")


def _clocks(survey: Survey) -> Iterator[Finding]:
    offsets = {}
    for name, reporter in survey.reporters.items():
        before = time.time()  # the answer was given between the two times, on average half way
        answers, _ = _wait_for({name: reporter.clock.remote()}, _CLOCK_S)
        after = time.time()
        if name in answers:
            offsets[name] = answers[name] - (before + after) / 2
    yield from _clock_findings(offsets)


def _clock_findings(offsets: Mapping[str, float]) -> Iterator[Finding]:
    """Judge clocks by the seconds that each is ahead of this machine's."""
    far = {name: offset for name, offset in offsets.items() if abs(offset) > _CLOCK_S}
    for name, offset in far.items():
        way = "ahead of" if offset > 0 else "behind"
        text = f"{name}: {abs(offset):.1f} s {way} this machine; needed {_CLOCK_S:g} s or less; run NTP on every node"
        yield Finding("warn", "clock", text)
    if offsets and not far:
        most = max(map(abs, offsets.values()))
        yield Finding("ok", "clock", f"{plural(len(offsets), 'node')} at most {most:.2f} s off this machine's clock")


def _exposure(survey: Survey) -> Iterator[Finding]:
    """Check who may run code on the cluster: anyone who reaches a port of Ray, unless Ray asks for a token."""
    without = [name for name, report in survey.reports.items() if report["token"] is False]
    asking = [name for name, report in survey.reports.items() if report["token"] is True]
    exposed, dashboards, hidden = set(), set(), []
    for name, report in survey.reports.items():
        if isinstance(report["listening"], str) or not report["listening"]:
            hidden.append(name)
            continue
        for process, address, port in report["listening"]:
            if is_loopback(address):
                continue
            exposed.add(process)
            if process == "dashboard" and ip_address(address).is_unspecified:
                dashboards.add(f"{name} port {port}")
    if without and exposed:
        yield Finding(
            "warn",
            "auth",
            f"Ray on {_names(without)} asks for no token, and {', '.join(sorted(exposed))} can be reached from "
            f"other machines, so anyone there can run code on the cluster; start every node with "
            f"RAY_AUTH_MODE=token and one token",
        )
    elif without:
        reach = "its ports could not be listed" if hidden else "it listens on loopback addresses only"
        state = "warn" if hidden else "ok"
        yield Finding(state, "auth", f"Ray on {_names(without)} asks for no token; {reach}")
    elif asking:
        yield Finding("ok", "auth", f"token authentication is on, on {plural(len(asking), 'node')}")
    for place in sorted(dashboards):
        text = f"the dashboard listens on every address of {place}; start the head with --dashboard-host 127.0.0.1"
        yield Finding("warn", "auth", text)
