"""What workers hand each other in one step of a stage, in bytes: what they were found to ask for, laid on the mesh.

Every exchange of mesh.py, engine.py, deepspeed_engine.py and teachers.py in orchestration/training/ is here; a test
counts the bytes of real steps and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from experts.data.batches import share
from orchestration.config.recipe import StageConfig
from orchestration.config.run_config import RunConfig
from orchestration.preflight.rehearsal import Load, Norms, TeacherLoad
from orchestration.training.mesh import MeshShape

Kind = Literal["all-gather", "all-reduce"]
Axis = Literal["slots", "replicas", "all"]


@dataclass(frozen=True)
class Exchange:
    """One thing that workers exchange in every step.

    Attributes:
        what: in words.
        kind: how; an all-gather hands every part to all, an all-reduce everyone their sum.
        axis: who takes part: the slots of one replica, the replicas of one slot, or all workers.
        among: how many those are.
        payloads: bytes that a worker puts in, by its slot; None where that needs C. Of what grows with the images, the
            share of the first replica, which is the largest.
    """

    what: str
    kind: Kind
    axis: Axis
    among: int
    payloads: tuple[int | None, ...]

    @property
    def payload(self) -> int | None:
        """Of the slot that puts in most."""
        return None if None in self.payloads else max(self.payloads)  # type: ignore[type-var]

    def sent(self, slot: int) -> int | None:
        """Bytes that a worker sends if the exchange runs as a ring."""
        payload = self.payloads[slot]
        if payload is None:
            return None
        parts = self.among - 1
        return payload * parts if self.kind == "all-gather" else round(2 * payload * parts / self.among)


Teachers = Mapping[str, TeacherLoad | None]


def dealt(teachers: Teachers, slots: int) -> dict[str, list[int]]:
    """Experts of each teacher in each slot. They are dealt out in turn, one teacher after the other."""
    found, turn = {}, 0
    for name, teacher in teachers.items():
        found[name] = [0] * slots
        for _ in range(teacher.num_experts if teacher else 0):
            found[name][turn % slots] += 1
            turn += 1
    return found


def shares_of(images: int, replicas: int) -> tuple[int, ...]:
    """Images of each replica; the first ones have one more where they do not divide evenly."""
    bounds = [share(images, replica, replicas) for replica in range(replicas)]
    return tuple(stop - start for start, stop in bounds)


def rings(axis: Axis, shape: MeshShape) -> list[list[int]]:
    """Ranks that take part in an exchange together, every group in the order of its ring."""
    ranks = [[slot * shape.replicas + replica for replica in range(shape.replicas)] for slot in range(shape.slots)]
    if axis == "replicas":
        return ranks
    if axis == "slots":
        return [list(column) for column in zip(*ranks, strict=True)]
    return [list(range(shape.workers))]


def link_bytes(exchanges: tuple[Exchange, ...], shape: MeshShape) -> dict[tuple[int, int], int | None]:
    """Bytes that one worker sends to another in a step, at most, if exchanges run as rings; None where that needs C."""
    found: dict[tuple[int, int], int | None] = {}
    for exchange in exchanges:
        for ring in rings(exchange.axis, shape):
            for sender, receiver in zip(ring, [*ring[1:], ring[0]], strict=True):
                sent, before = exchange.sent(shape.position(sender)[0]), found.get((sender, receiver), 0)
                found[sender, receiver] = None if sent is None or before is None else before + sent
    return found


_Row = tuple[str, Kind, Axis, int | None]


def exchanges(
    config: RunConfig, stage: StageConfig, shape: MeshShape, loads: list[Load], teachers: Teachers
) -> tuple[Exchange, ...]:
    """Of one step.

    Args:
        config: of the run.
        stage: of the stage.
        shape: of the mesh.
        loads: what a worker of each slot was found to ask for.
        teachers: what they ask for; None where that is not known.
    """
    experts_in = dealt(teachers, shape.slots)
    members: dict[Axis, int] = {"slots": shape.slots, "replicas": shape.replicas, "all": shape.workers}
    found: dict[str, tuple[Kind, Axis, list[int | None]]] = {}
    for slot, load in enumerate(loads):
        here = {name: (teacher, experts_in[name][slot]) for name, teacher in teachers.items()}
        rows = [*_between_slots(config, stage, shape, load, teachers), *_gradients(config, shape, load)]
        for what, kind, axis, payload in [*rows, *_between_replicas(config, stage, shape, load, here)]:
            found.setdefault(what, (kind, axis, [0] * shape.slots))[2][slot] = payload
    return tuple(Exchange(what, kind, axis, members[axis], tuple(parts)) for what, (kind, axis, parts) in found.items())


def _between_slots(
    config: RunConfig, stage: StageConfig, shape: MeshShape, load: Load, teachers: Teachers
) -> Iterator[_Row]:
    slots = shape.slots
    if slots == 1:
        return
    images = max(shares_of(stage.batch_size, shape.replicas))
    for what, per_image in zip(("logits", "scores of the gates"), load.logits, strict=False):
        yield what, "all-gather", "slots", images * per_image
    for name, teacher in teachers.items():
        # Every slot gives rows for as many experts as the fullest one has.
        rows = None if teacher is None else -(-teacher.num_experts // slots) * images * teacher.num_classes
        yield f"scores of teacher {name}", "all-gather", "slots", None if rows is None else rows * number_bytes(config)
    if load.in_turn:
        yield "running statistics of the trunks, in turn", "all-gather", "slots", 8 * load.in_turn


def _gradients(config: RunConfig, shape: MeshShape, load: Load) -> Iterator[_Row]:
    parts: tuple[tuple[str, str, Axis, int], ...] = (
        ("trunk", "trunk", "all", shape.workers),
        ("shared", "shared last layer", "all", shape.workers),
        ("experts", "experts", "replicas", shape.replicas),
    )
    for part, what, axis, among in parts:
        groups = load.learning[part]
        if among == 1 or not groups:
            continue
        yield f"gradient, {what}", "all-reduce", axis, sum(groups) * number_bytes(config)
        if config.engine.name == "deepspeed":
            # One float32 for each learning rate, whatever the precision.
            yield f"norm of the gradient, {what} (ZeRO)", "all-reduce", axis, 4 * len(groups)
            # ZeRO fills each learning rate's numbers up to a multiple of twice the workers.
            own = sum(2 * -(-numbers // (2 * among)) for numbers in groups)
            yield f"updated weights, {what} (ZeRO)", "all-gather", axis, own * number_bytes(config)


def _between_replicas(
    config: RunConfig,
    stage: StageConfig,
    shape: MeshShape,
    load: Load,
    teachers: Mapping[str, tuple[TeacherLoad | None, int]],
) -> Iterator[_Row]:
    replicas, number = shape.replicas, number_bytes(config)
    if replicas == 1:
        return
    if config.engine.sync_batchnorm and load.norms.layers:
        yield "BatchNorm statistics", "all-gather", "replicas", _statistics(load.norms) * number
        yield "BatchNorm gradients", "all-reduce", "replicas", 2 * load.norms.back * number
    for name, (teacher, experts) in teachers.items():
        if stage.teachers[name].mode == "train":
            found = None if teacher is None else _statistics(teacher.norms(experts)) * number
            yield f"BatchNorm statistics of teacher {name}", "all-gather", "replicas", found
    yield "loss and its terms", "all-reduce", "replicas", 8 * load.terms


def _statistics(norms: Norms) -> int:
    """Numbers: mean and squared deviations of every channel, and each layer's count."""
    return 2 * norms.channels + norms.layers


def number_bytes(config: RunConfig) -> int:
    """Bytes of a weight, and of everything that is computed in its precision."""
    return 8 if config.engine.precision == "float64" else 4
