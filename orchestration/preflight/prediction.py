"""Predict how long a training step takes in a placement. Pure functions of what it asks and of what was measured.

    step     = compute x crowding  +  exchanges
    exchange = times x rounds x latency  +  bytes sent / bandwidth

Compute is that of the busiest worker, measured without its exchanges (gauge.py). Where that is not possible it is
calls of torch x seconds per call + multiply-adds x seconds each, of an order of magnitude. Latency and bandwidth are
fitted to two measured all-reduces. Exchanges are those of a rehearsed step (rehearsal.py), run as rings, and nothing
overlaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestration.preflight.plan import StagePlan
from orchestration.preflight.traffic import Exchange
from orchestration.training.exchange import Kind
from orchestration.training.mesh import MeshShape

WORTH = 1.3
"""Speed-up over the packed run below which more workers are better used for more runs."""
_EQUAL = 1.1  # times within this factor are not told apart: measurements differ by as much from start to start


@dataclass(frozen=True)
class Speed:
    """The speed of a worker, as an order of magnitude: seconds per call of torch, and per multiply-add."""

    call_s: float
    work_s: float


@dataclass(frozen=True)
class Link:
    """The link between two workers: seconds that every round of an exchange takes, and bytes per second."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Step:
    """The load of a step on the busiest worker.

    Attributes:
        calls: of torch, as `Load.calls`.
        work: multiply-adds per image, forward and backward.
        images: of the first replica, which has most.
        exchanges: of the step.
    """

    calls: int
    work: float
    images: int
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """The time of one placement.

    Attributes:
        shape: of its mesh.
        step_s: seconds per step, by stage.
        epoch_s: seconds per epoch, by stage; None where only the data can say how many steps it has.
        run_s: seconds of all steps; where epochs are unknown, of one step for each epoch.
    """

    shape: MeshShape
    step_s: Mapping[str, float]
    epoch_s: Mapping[str, float | None]
    run_s: float


# What was measured


def fit_link(among: int, small: tuple[int, float], large: tuple[int, float]) -> Link:
    """Return the link that explains two measured all-reduces, each given by its bytes and seconds.

    Args:
        among: number of workers that took part.
        small, large: with few and with many bytes.
    """
    (a, a_s), (b, b_s) = small, large
    byte_s = max(b_s - a_s, 1e-12) / (b - a)
    return Link(max(a_s - a * byte_s, 0.0) / rounds("all-reduce", among), 2 * (among - 1) / among / byte_s)


# What follows


def rounds(kind: Kind, among: int) -> int:
    """Return how often the members of a ring send to their neighbours in one exchange."""
    return 2 * (among - 1) if kind == "all-reduce" else among - 1


def exchange_s(exchange: Exchange, link: Link) -> float:
    """Return the seconds of an exchange in one step, for the slot that sends most.

    Its bytes must be known.
    """
    sent = [exchange.sent(slot) or 0 for slot in range(len(exchange.payloads))]
    latency_s = exchange.times * rounds(exchange.kind, exchange.among) * link.latency_s
    return latency_s + max(sent) / link.bytes_per_s


def exchanges_s(step: Step, link: Link) -> float:
    """Return the seconds of all exchanges of a step."""
    return sum(exchange_s(exchange, link) for exchange in step.exchanges)


def assumed_compute_s(step: Step, speed: Speed) -> float:
    """Return the seconds that a worker of this speed computes in a step."""
    return step.calls * speed.call_s + step.work * step.images * speed.work_s


def step_of(stage: StagePlan) -> Step | None:
    """Return what a planned step asks of the busiest worker; None where the data or a teacher must say first."""
    if stage.slot_work is None or any(exchange.payload is None for exchange in stage.exchanges):
        return None
    images = stage.shares[0]
    calls, work = max(zip(stage.slot_calls, stage.slot_work, strict=True), key=lambda asked: (asked[1], asked[0]))
    return Step(calls, work, images, stage.exchanges)


def predict(
    shape: MeshShape, stages: Sequence[StagePlan], compute_s: Mapping[str, float], link: Link, crowding: float = 1.0
) -> Prediction | None:
    """Predict the time of a placement; None where the data or a teacher must say first what a step exchanges.

    Args:
        shape: of the mesh.
        stages: of the run, planned on that mesh.
        compute_s: seconds that the busiest worker computes in a step, by stage, if nothing else uses its CPUs.
        link: between the workers.
        crowding: threads of the fullest node divided by its CPUs, at least 1; 1 on GPUs.
    """
    each: dict[str, float] = {}
    epochs: dict[str, float | None] = {}
    run_s = 0.0
    for stage in stages:
        if not stage.epochs:
            continue
        step = step_of(stage)
        if step is None:
            return None
        each[stage.name] = compute_s[stage.name] * crowding + exchanges_s(step, link)
        epochs[stage.name] = None if stage.steps_per_epoch is None else stage.steps_per_epoch * each[stage.name]
        run_s += stage.epochs * (epochs[stage.name] or each[stage.name])
    return Prediction(shape, each, epochs, run_s)


def busiest_work(stages: Sequence[StagePlan]) -> float | None:
    """Return the multiply-adds of a run on its busiest worker; None where the data or a teacher must say.

    Where epochs are unknown, of one step for each epoch: the same for every placement.
    """
    total = 0.0
    for stage in stages:
        if stage.epochs:
            step = step_of(stage)
            if step is None:
                return None
            total += stage.epochs * (stage.steps_per_epoch or 1) * step.work * step.images
    return total


# What to do


def fastest(found: Sequence[Prediction], sent: Mapping[MeshShape, int]) -> Prediction:
    """Return the fastest placement; of those that are as fast within 10 %, the one that sends fewest bytes.

    So a measurement that differs a little from the last one does not change the choice.

    Args:
        found: at least one.
        sent: bytes that a worker sends per step.
    """
    limit = _EQUAL * min(prediction.run_s for prediction in found)
    near = [prediction for prediction in found if prediction.run_s <= limit]
    return min(near, key=lambda prediction: (sent[prediction.shape], prediction.shape.workers))


def recommended(packed: Prediction, others: Sequence[Prediction], sent: Mapping[MeshShape, int]) -> Prediction:
    """Return the packed placement unless another is at least `WORTH` times as fast; of several, `fastest`."""
    worth = [other for other in others if packed.run_s >= WORTH * other.run_s]
    return fastest(worth, sent) if worth else packed
