"""What workers hand each other in one step of a stage, in bytes: what they were found to ask for, laid on the mesh.

Every exchange of orchestration/mesh.py, engine.py, deepspeed_engine.py and teachers.py is here; a test counts the bytes
of real steps and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from experts.data.batches import share
from orchestration.config import RunConfig, StageConfig
from orchestration.mesh import MeshShape
from orchestration.rehearsal import Load, Norms, TeacherLoad

Kind = Literal["all-gather", "all-reduce"]


@dataclass(frozen=True)
class Exchange:
    """One thing that workers exchange in every step.

    Attributes:
        what: in words.
        kind: how; an all-gather hands every part to all, an all-reduce everyone their sum.
        among: workers that take part.
        payloads: bytes that a worker puts in, by its slot; None where that needs C. Of what grows with the images, the
            share of the first replica, which is the largest.
    """

    what: str
    kind: Kind
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


_Row = tuple[str, Kind, int, int | None]


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
    found: dict[str, tuple[Kind, int, list[int | None]]] = {}
    for slot, load in enumerate(loads):
        here = {name: (teacher, experts_in[name][slot]) for name, teacher in teachers.items()}
        rows = [*_between_slots(config, stage, shape, load, teachers), *_gradients(config, shape, load)]
        for what, kind, among, payload in [*rows, *_between_replicas(config, stage, shape, load, here)]:
            found.setdefault(what, (kind, among, [0] * shape.slots))[2][slot] = payload
    return tuple(Exchange(what, kind, among, tuple(parts)) for what, (kind, among, parts) in found.items())


def _between_slots(
    config: RunConfig, stage: StageConfig, shape: MeshShape, load: Load, teachers: Teachers
) -> Iterator[_Row]:
    slots = shape.slots
    if slots == 1:
        return
    images = max(shares_of(stage.batch_size, shape.replicas))
    for what, per_image in zip(("logits", "scores of the gates"), load.logits, strict=False):
        yield what, "all-gather", slots, images * per_image
    for name, teacher in teachers.items():
        # Every slot gives rows for as many experts as the fullest one has.
        rows = None if teacher is None else -(-teacher.num_experts // slots) * images * teacher.num_classes
        yield f"scores of teacher {name}", "all-gather", slots, None if rows is None else rows * number_bytes(config)
    if load.in_turn:
        yield "running statistics of the trunks, in turn", "all-gather", slots, 8 * load.in_turn


def _gradients(config: RunConfig, shape: MeshShape, load: Load) -> Iterator[_Row]:
    parts = (
        ("trunk", "trunk", shape.workers),
        ("shared", "shared last layer", shape.workers),
        ("experts", "experts", shape.replicas),
    )
    for part, what, among in parts:
        groups = load.learning[part]
        if among == 1 or not groups:
            continue
        yield f"gradient, {what}", "all-reduce", among, sum(groups) * number_bytes(config)
        if config.engine.name == "deepspeed":
            # One float32 for each learning rate, whatever the precision.
            yield f"norm of the gradient, {what} (ZeRO)", "all-reduce", among, 4 * len(groups)
            # ZeRO fills each learning rate's numbers up to a multiple of twice the workers.
            own = sum(2 * -(-numbers // (2 * among)) for numbers in groups)
            yield f"updated weights, {what} (ZeRO)", "all-gather", among, own * number_bytes(config)


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
        yield "BatchNorm statistics", "all-gather", replicas, _statistics(load.norms) * number
        yield "BatchNorm gradients", "all-reduce", replicas, 2 * load.norms.back * number
    for name, (teacher, experts) in teachers.items():
        if stage.teachers[name].mode == "train":
            found = None if teacher is None else _statistics(teacher.norms(experts)) * number
            yield f"BatchNorm statistics of teacher {name}", "all-gather", replicas, found
    yield "loss and its terms", "all-reduce", replicas, 8 * load.terms


def _statistics(norms: Norms) -> int:
    """Numbers: mean and squared deviations of every channel, and each layer's count."""
    return 2 * norms.channels + norms.layers


def number_bytes(config: RunConfig) -> int:
    """Bytes of a weight, and of everything that is computed in its precision."""
    return 8 if config.engine.precision == "float64" else 4
