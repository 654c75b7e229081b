"""The bytes that workers exchange in one step of a stage, computed from a rehearsed step (rehearsal.py) and the mesh.

Every exchange made by mesh.py, engine.py, deepspeed_engine.py and teachers.py in orchestration/training/ is listed
here. A test counts the bytes of real steps and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from experts.batches import share
from orchestration.config.recipe import StageConfig
from orchestration.config.run_config import RunConfig
from orchestration.preflight.rehearsal import Load, Norms, TeacherLoad
from orchestration.training.mesh import MeshShape

Kind = Literal["all-gather", "all-reduce"]


@dataclass(frozen=True)
class Exchange:
    """One collective operation that workers carry out in every step.

    Attributes:
        what: in words.
        kind: an all-gather gives every part to everyone, an all-reduce gives everyone the sum.
        among: number of workers that take part.
        payloads: bytes that a worker contributes, by its slot; None where that needs the number of classes. Where it
            grows with the images, the share of the first replica, which is the largest.
    """

    what: str
    kind: Kind
    among: int
    payloads: tuple[int | None, ...]

    @property
    def payload(self) -> int | None:
        """Bytes of the slot that contributes most."""
        return None if None in self.payloads else max(self.payloads)  # type: ignore[type-var]

    def sent(self, slot: int) -> int | None:
        """Return the bytes that a worker sends if the exchange runs as a ring."""
        payload = self.payloads[slot]
        if payload is None:
            return None
        others = self.among - 1
        return payload * others if self.kind == "all-gather" else round(2 * payload * others / self.among)


Teachers = Mapping[str, TeacherLoad | None]


def deal_teachers(teachers: Teachers, slots: int) -> dict[str, list[int]]:
    """Return how many experts of each teacher every slot holds. They are dealt out in turn, teacher after teacher."""
    held, turn = {}, 0
    for name, teacher in teachers.items():
        held[name] = [0] * slots
        for _ in range(teacher.num_experts if teacher else 0):
            held[name][turn % slots] += 1
            turn += 1
    return held


def shares_of(images: int, replicas: int) -> tuple[int, ...]:
    """Return the images of each replica; the first ones have one more where they do not divide evenly."""
    bounds = [share(images, replica, replicas) for replica in range(replicas)]
    return tuple(stop - start for start, stop in bounds)


_Row = tuple[str, Kind, int, int | None]  # what, kind, among, payload of one slot


def exchanges(
    config: RunConfig, stage: StageConfig, shape: MeshShape, loads: list[Load], teachers: Teachers
) -> tuple[Exchange, ...]:
    """List the exchanges of one step.

    Args:
        config: of the run.
        stage: of the stage.
        shape: of the mesh.
        loads: of a worker of each slot, from the rehearsal.
        teachers: their loads; None where one is not known.
    """
    held = deal_teachers(teachers, shape.slots)

    # Slots may differ in what they exchange; a slot that takes no part in an exchange contributes 0 bytes.
    found: dict[str, tuple[Kind, int, list[int | None]]] = {}
    for slot, load in enumerate(loads):
        here = {name: (teacher, held[name][slot]) for name, teacher in teachers.items()}
        rows = [*_between_slots(config, stage, shape, load, teachers), *_gradients(config, shape, load)]
        for what, kind, among, payload in [*rows, *_between_replicas(config, stage, shape, load, here)]:
            found.setdefault(what, (kind, among, [0] * shape.slots))[2][slot] = payload
    return tuple(Exchange(what, kind, among, tuple(payloads)) for what, (kind, among, payloads) in found.items())


def _between_slots(
    config: RunConfig, stage: StageConfig, shape: MeshShape, load: Load, teachers: Teachers
) -> Iterator[_Row]:
    slots = shape.slots
    if slots == 1:
        return
    assert stage.batch_size is not None
    images = max(shares_of(stage.batch_size, shape.replicas))
    # Flows exchange logits first; only a router's flow exchanges a second tensor.
    for what, per_image in zip(("logits", "scores of the gates"), load.logits, strict=False):
        yield what, "all-gather", slots, images * per_image

    for name, teacher in teachers.items():
        # Every slot contributes rows for as many experts as the fullest slot holds.
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
            # ZeRO pads the parameters of each learning rate to a multiple of twice the workers.
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
            payload = None if teacher is None else _statistics(teacher.norms(experts)) * number
            yield f"BatchNorm statistics of teacher {name}", "all-gather", replicas, payload

    yield "loss and its terms", "all-reduce", replicas, 8 * load.terms


def _statistics(norms: Norms) -> int:
    """Count the numbers exchanged: mean and squared deviations of every channel, and one count per layer."""
    return 2 * norms.channels + norms.layers


def number_bytes(config: RunConfig) -> int:
    """Return the bytes of a weight, and of everything computed in its precision."""
    return 8 if config.engine.precision == "float64" else 4
