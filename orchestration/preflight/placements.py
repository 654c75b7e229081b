"""Compare the placements that a run could have: what each asks of its busiest worker, how long it takes, which to take.

candidates     packed on one worker; every mesh that fits the workers asked for, or at hand
measure        what one worker computes in a step, links between two           node_speed.py, if Ray runs
compare        a plan of each candidate, and its predicted time                prediction.py
Comparison.choice       what `cluster.experts_per_worker=auto` stands for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from orchestration.cluster.placement import Placement, bundle_of, largest_share, pack, places, shapes_of, with_shape
from orchestration.config.run_config import RunConfig
from orchestration.preflight.node_speed import Measured, Task, measure
from orchestration.preflight.plan import Plan, StagePlan, blank_counts, plan
from orchestration.preflight.prediction import (
    Link,
    Prediction,
    Speed,
    assumed_compute_s,
    busiest_work,
    fastest,
    fit_link,
    predict,
    recommended,
    step_of,
)
from orchestration.training.mesh import MeshShape

Nodes = Mapping[str, Mapping[str, float]]
ONE_NODE, NODES = "inside a node", "between nodes"

_ASSUMED_SPEED = {"cpu": Speed(1e-5, 5e-11), "gpu": Speed(1e-5, 3e-13)}
_ASSUMED_LINK = {
    ("cpu", ONE_NODE): Link(1e-4, 1e9),
    ("cpu", NODES): Link(2e-4, 1e9),
    ("gpu", ONE_NODE): Link(2e-5, 2e10),
    ("gpu", NODES): Link(4e-5, 2e9),
}
"""Orders of magnitude, for `auto` where nothing can be measured. A CPU's speed is that of one thread."""


@dataclass(frozen=True)
class Workers:
    """The workers of a placement.

    Attributes:
        cpus, threads: of each.
        link: what lies between the two that are farthest apart.
        crowding: threads of the fullest node divided by its CPUs, at least 1; 1 on GPUs.
    """

    cpus: float
    threads: int
    link: str
    crowding: float


@dataclass(frozen=True)
class Candidate:
    """A placement that a run could have.

    Attributes:
        shape: of the mesh.
        workers: None where the nodes are unknown, or have no room for them.
        stages: planned, for the first slot; slots do alike work.
        prediction: of its time; None where workers, their speed or the step are unknown.
        assumed: whether the prediction rests on orders of magnitude instead of measurements.
    """

    shape: MeshShape
    workers: Workers | None
    stages: tuple[StagePlan, ...]
    prediction: Prediction | None
    assumed: bool = False

    @property
    def sent(self) -> int | None:
        """Bytes that a worker sends per step, in the stage with most; None where the data must say."""
        sent = [stage.sent() for stage in self.stages]
        return None if None in sent else max(sent, default=0)  # type: ignore[type-var]

    @cached_property
    def work(self) -> float | None:
        """Multiply-adds of the run on the busiest worker; None where the data must say."""
        return busiest_work(self.stages)


@dataclass(frozen=True)
class Comparison:
    """The candidates of a run, the packed one first.

    Attributes:
        asked: number of workers in the config.
        candidates: see `candidates`.
        measured: None if nothing was.
        auto: whether the config leaves the choice to us.
        one_statistic: whether BatchNorm sees the whole batch, so that replicas change no result.
    """

    asked: int
    candidates: tuple[Candidate, ...]
    measured: Measured | None = None
    auto: bool = False
    one_statistic: bool = True

    @property
    def packed(self) -> Candidate:
        return self.candidates[0]

    @property
    def complete(self) -> bool:
        """Whether there is a time for every placement that the cluster has room for, all from measurements."""
        fitting = [c for c in self.candidates if c.workers is not None]
        return bool(fitting) and all(c.prediction is not None and not c.assumed for c in fitting)

    def gain(self, candidate: Candidate) -> float | None:
        """Return how many times as fast as the packed run a placement is; None where that is not known."""
        if candidate.prediction is None or self.packed.prediction is None:
            return None
        return self.packed.prediction.run_s / candidate.prediction.run_s

    def bound(self, candidate: Candidate) -> float | None:
        """Return how many times as fast it were at most, if exchanges and calls took no time."""
        if not candidate.work or not self.packed.work:
            return None
        return self.packed.work / candidate.work

    @cached_property
    def recommended(self) -> Candidate | None:
        """The placement to take if the number of workers is free; None unless all times were measured."""
        timed = self._timed(self.candidates)
        if self.packed.prediction is None or not self.complete:
            return None
        others = [c.prediction for c in timed if c is not self.packed and c.prediction]
        return self._with(recommended(self.packed.prediction, others, self._sent(timed)))

    @cached_property
    def choice(self) -> Candidate:
        """The fastest placement on the workers asked for, for which `cluster.experts_per_worker=auto` stands.

        Without times it is the one with the fewest experts per worker, and so it is where replicas would change results
        because each has BatchNorm statistics of its own.
        """
        fitting = [c for c in self.candidates if c.shape.workers == self.asked]
        timed = self._timed(fitting)
        if not timed or not self.one_statistic:
            return min(fitting, key=lambda c: c.shape.experts_per_worker)
        found = [c.prediction for c in timed if c.prediction is not None]
        return self._with(fastest(found, self._sent(timed)))

    def _timed(self, among: tuple[Candidate, ...] | list[Candidate]) -> list[Candidate]:
        return [c for c in among if c.prediction is not None and c.sent is not None]

    def _sent(self, among: list[Candidate]) -> dict[MeshShape, int]:
        return {c.shape: c.sent or 0 for c in among}

    def _with(self, prediction: Prediction) -> Candidate:
        return next(c for c in self.candidates if c.shape == prediction.shape)


def shapes(config: RunConfig, nodes: Nodes | None) -> list[MeshShape]:
    """Return the meshes to compare: packed on one worker, then those on more workers.

    They are on as many workers as the config asks for. If it asks for one, they are on one worker per expert and on all
    that the cluster has GPUs for.
    """
    num_experts, asked = config.method.num_experts, config.cluster.workers
    counts = {asked}
    if asked == 1:
        counts = {num_experts} if nodes is None or _room(config, nodes) >= num_experts else set()
        if nodes is not None and config.cluster.gpus_per_worker:
            counts.add(_room(config, nodes))
    more = [shape for count in sorted(counts - {0, 1}) for shape in shapes_of(num_experts, count)]
    return [MeshShape(num_experts, num_experts), *more]


def _room(config: RunConfig, nodes: Nodes) -> int:
    """Return how many workers the cluster has room for."""
    bundle = bundle_of(config.cluster, config.cluster.cpus_per_worker or 0.01)
    return sum(places(node, bundle) for node in nodes.values())


def workers_of(config: RunConfig, shape: MeshShape, nodes: Nodes) -> tuple[Workers, Placement] | None:
    """Return what the workers of a mesh would be on some nodes, and where; None where they do not fit."""
    cpus_of = [node.get("CPU", 0.0) for node in nodes.values()]
    cpus = config.cluster.cpus_per_worker or largest_share(shape.workers * config.side_by_side, cpus_of)
    placement = pack(shape.workers, bundle_of(config.cluster, cpus), nodes)
    if placement is None:
        return None
    threads = config.engine.threads or max(1, int(cpus))
    crowding = 1.0
    if not config.cluster.gpus_per_worker:
        full = (len(placement.on(node)) * threads / nodes[node]["CPU"] for node in placement.nodes)
        crowding = max(1.0, *full)
    return Workers(cpus, threads, ONE_NODE if len(placement.nodes) == 1 else NODES, crowding), placement


def measure_for(config: RunConfig, nodes: Nodes) -> Measured:
    """Measure what `compare` needs, on the connected cluster. Takes some ten seconds, and longer for big networks."""
    found = {shape: workers_of(config, shape, nodes) for shape in shapes(config, nodes)}
    if len(found) == 1:  # nothing to compare
        return Measured()
    fitting = {shape: where for shape, where in found.items() if where is not None}
    if not fitting:
        return Measured(problems=["nothing was measured: no placement fits the cluster"])
    first, partners = _partners(list(fitting.values()))
    task = Task(
        configs={shape: with_shape(config, shape) for shape in fitting},
        threads={shape: workers.threads for shape, (workers, _) in fitting.items()},
        counts_C={name: blank_counts(config, name) for name, stage in config.method.stages.items() if stage.epochs},
        first=first,
        partners=partners,
        beside={
            shape: ONE_NODE
            for shape, (workers, _) in fitting.items()
            if _share_node(config, shape, workers, nodes[first], partners)
        },
        bundle=bundle_of(config.cluster, min(workers.cpus for workers, _ in fitting.values())),
    )
    return measure(task)


def _share_node(
    config: RunConfig, shape: MeshShape, workers: Workers, node: Mapping[str, float], partners: Mapping[str, str]
) -> bool:
    """Return whether two workers of a mesh can be timed at once on a node, so that they share its memory and caches.

    Not where their threads would outnumber its CPUs: that is what crowding is for.
    """
    room = config.cluster.gpus_per_worker or 2 * workers.threads <= node["CPU"]
    return shape.workers > 1 and ONE_NODE in partners and bool(room)


def _partners(found: Sequence[tuple[Workers, Placement]]) -> tuple[str, dict[str, str]]:
    """Return the node to measure on, and the node of a second worker for each kind of link between workers."""
    several = [(workers.link, placement.nodes) for workers, placement in found if len(placement.node_of) > 1]
    first = next((nodes[0] for link, nodes in several if link == ONE_NODE), found[0][1].nodes[0])
    # Any other node does for a link between nodes.
    partners = {link: next(node for node in nodes if (node == first) == (link == ONE_NODE)) for link, nodes in several}
    return first, partners


def compare(
    config: RunConfig,
    nodes: Nodes | None,
    measured: Measured | None = None,
    planned: Plan | None = None,
) -> Comparison:
    """Compare the placements of a run. If the choice is ours, orders of magnitude stand for what was not measured.

    Args:
        config: validated.
        nodes: resources by node; None if they are unknown.
        measured: on those nodes.
        planned: the run on one of the meshes, if that is known already.
    """
    found = []
    auto = config.cluster.experts_per_worker == "auto"
    for shape in shapes(config, nodes):
        known = planned is not None and planned.shape == shape
        stages = planned.stages if planned and known else plan(with_shape(config, shape), slots=range(1)).stages
        where = None if nodes is None else workers_of(config, shape, nodes)
        workers = where[0] if where else None
        if nodes is None and auto:
            workers = Workers(1, config.engine.threads or 1, ONE_NODE, 1.0)
        candidate = Candidate(shape, workers, stages, None)
        found.append(candidate if workers is None else _timed(candidate, workers, measured) or candidate)
    if auto and any(c.workers is not None and c.prediction is None for c in found):
        # All of them: a measured time and an order of magnitude cannot be compared.
        found = [c if c.workers is None else _assumed(config, c, c.workers) for c in found]
    return Comparison(config.cluster.workers, tuple(found), measured, auto, config.engine.sync_batchnorm)


def _timed(candidate: Candidate, workers: Workers, measured: Measured | None) -> Candidate | None:
    """Return a candidate with its time, if everything that this takes was measured."""
    if measured is None or candidate.shape not in measured.compute_s:
        return None
    link = Link(0.0, 1.0)
    if candidate.shape.workers > 1:
        if workers.link not in measured.links:
            return None
        link = fit_link(2, *measured.links[workers.link])
    compute_s = measured.compute_s[candidate.shape]
    return replace(candidate, prediction=predict(candidate.shape, candidate.stages, compute_s, link, workers.crowding))


def _assumed(config: RunConfig, candidate: Candidate, workers: Workers) -> Candidate:
    """Return a candidate with a time by orders of magnitude."""
    kind = "gpu" if config.cluster.gpus_per_worker else "cpu"
    speed = _ASSUMED_SPEED[kind]
    if kind == "cpu":
        speed = Speed(speed.call_s, speed.work_s / workers.threads)
    steps = {stage.name: step_of(stage) for stage in candidate.stages if stage.epochs}
    compute_s = {name: assumed_compute_s(step, speed) for name, step in steps.items() if step is not None}
    link = _ASSUMED_LINK[kind, workers.link]
    prediction = predict(candidate.shape, candidate.stages, compute_s, link, workers.crowding)
    return replace(candidate, prediction=prediction, assumed=True)
