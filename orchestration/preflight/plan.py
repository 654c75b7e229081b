"""Where a run's experts and images would lie, what crosses the network, what it costs: a pure function of its config.

Nothing is started and no data is read, so sizes of sets that list or scan files stay open. What a step asks of a worker
is found by trying one on blank images (rehearsal.py); here it is laid on the mesh. plan.py puts it in words.

Letters: E experts in all, e in one slot, S expert slots, R replicas, W = S R workers, B images, C classes, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from experts.class_groups import GroupRule
from experts.data.imbalance import hold_out, long_tailed_counts, select
from experts.flow import PARTS
from experts.registry import build, piece
from orchestration.config.recipe import StageConfig, stage_classes
from orchestration.config.run_config import RunConfig
from orchestration.preflight.rehearsal import Costs, Load, TeacherLoad, costs_of, rehearse, teacher_load
from orchestration.preflight.traffic import Exchange, Teachers, dealt, exchanges, number_bytes, shares_of
from orchestration.training.mesh import MeshShape, mesh_shape

WORKER_GIB = (0.8, 1.5)
"""Memory of a worker's process without weights, measured: digits on ResNet-8, CIFAR from JPEG files on ResNet-32."""
_DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
_TRAINING_IMAGES = {"digits": _DIGITS, "fashion_mnist": (6000,) * 10, "cifar10": (5000,) * 10, "cifar100": (500,) * 100}


@dataclass(frozen=True)
class Size:
    """An ensemble: parameters, and multiply-adds of one image through it. `None` where they need C.

    Attributes:
        trunk, shared: parameters before and after all experts.
        experts: parameters of each expert; a gate, or a bias that only one has, makes them differ.
        trunk_work, expert_work: multiply-adds; a shared head counts once for each expert.
    """

    trunk: int | None
    shared: int | None
    experts: tuple[int | None, ...]
    trunk_work: int | None
    expert_work: int | None

    @property
    def parameters(self) -> int | None:
        return _sum([self.trunk, self.shared, *self.experts])

    @property
    def work(self) -> int | None:
        return _sum([self.trunk_work, *[self.expert_work] * len(self.experts)])


@dataclass(frozen=True)
class StagePlan:
    """One stage. `None` where only the data can say.

    Attributes:
        experts: names, in the order of the logits.
        num_classes: that the stage knows.
        shares: images of a batch on each replica.
        learns: parts that learn.
        exchanges: of one step; empty with one worker.
        memory: bytes of weights, gradients, optimiser state and teachers on the worker that has most.
        work: multiply-adds of a training step per image, on all slots, with teachers; an image and its partner count
            once.
        repeated: multiply-adds of forward passes that spread adds, as a share of those in one place.
        teachers: by name; None where the run is not there.
    """

    name: str
    experts: tuple[str, ...]
    num_classes: int | None
    size: Size
    epochs: int
    batch_size: int
    shares: tuple[int, ...]
    images_per_epoch: int | None
    steps_per_epoch: int | None
    last_batch: int | None
    learns: tuple[str, ...]
    exchanges: tuple[Exchange, ...]
    memory: int | None
    work: float | None
    repeated: float | None
    teachers: dict[str, TeacherLoad | None]

    def sent(self) -> int | None:
        """Bytes that a worker sends in a step, of the slot that sends most."""
        slots = range(len(self.exchanges[0].payloads)) if self.exchanges else range(0)
        sums = [_sum([exchange.sent(slot) for exchange in self.exchanges]) for slot in slots]
        return None if None in sums else max(sums, default=0)  # type: ignore[type-var]


@dataclass(frozen=True)
class Plan:
    """A run's placement and cost.

    Attributes:
        shape: of the mesh of every stage.
        num_classes: C, None if only the data can say.
        counts: training images per class, None if only the data can say.
        stages: in the order of the recipe.
        waves: stages that may train side by side, wave after wave.
        side_by_side: most stages that train at once, each on workers of its own, where there are places.
    """

    shape: MeshShape
    num_classes: int | None
    counts: tuple[int, ...] | None
    stages: tuple[StagePlan, ...]
    waves: tuple[tuple[str, ...], ...]
    side_by_side: int

    @property
    def final(self) -> StagePlan:
        return self.stages[-1]

    @property
    def memory(self) -> int | None:
        """Bytes of the stage that needs most, on one worker."""
        found = [stage.memory for stage in self.stages]
        return None if None in found else max(found)  # type: ignore[type-var]

    def experts_on(self, rank: int, stage: StagePlan | None = None) -> tuple[str, ...]:
        """Names of the experts of a worker; unless said, in the last stage."""
        names = (stage or self.final).experts
        return tuple(names[i] for i in self.shape.experts_of(self.shape.position(rank)[0]))


def plan(config: RunConfig, nodes: Mapping[str, Mapping[str, float]] | None = None) -> Plan:
    """Lay a run out.

    Args:
        config: checked.
        nodes: resources by node, as Ray names them; given, a placement that they cannot hold is refused.

    Raises:
        ValueError: experts and workers do not fit, the counts asked for do not exist, a method's groups have no class,
            or the nodes are too few.
    """
    shape = mesh_shape(config.method.num_experts, config.cluster.workers, config.cluster.experts_per_worker)
    if nodes is not None and config.cluster.cpus_per_worker is not None:
        from orchestration.cluster.placement import check_fits

        check_fits(
            shape.workers,
            config.cluster.cpus_per_worker,
            config.cluster.gpus_per_worker,
            {name: dict(resources) for name, resources in nodes.items()},
            config.cluster.memory_gib_per_worker,
        )
    num_classes = _num_classes(config)
    counts = expected_counts(config, num_classes)
    waves = tuple(tuple(wave) for wave in config.method.waves())
    costs: dict[int, Costs] = {}
    return Plan(
        shape=shape,
        num_classes=num_classes,
        counts=None if counts is None else tuple(counts.tolist()),
        stages=tuple(_stage(config, name, shape, num_classes, counts, costs) for name in config.method.stages),
        waves=waves,
        side_by_side=config.side_by_side,
    )


def expected_counts(config: RunConfig, num_classes: int | None) -> np.ndarray | None:
    """Training images per class, int64 [C], where the config and the published sizes of a set decide them; else None.

    Raises:
        ValueError: the set has fewer images than the keys ask for.
    """
    data = config.dataset
    found = _TRAINING_IMAGES.get(data.source)
    if found is None or num_classes is None:
        ratio, largest = data.imbalance_ratio, data.max_per_class
        if None in (num_classes, ratio, largest) or data.val_per_class or data.balanced:
            return None
        assert num_classes is not None and ratio is not None and largest is not None
        return long_tailed_counts(num_classes, largest, ratio, data.imbalance_type)
    labels = np.repeat(np.arange(num_classes), found)
    if data.test_per_class:
        labels = labels[hold_out(labels, num_classes, data.test_per_class, "test_per_class")[0]]
    chosen = select(
        labels,
        num_classes,
        imbalance_ratio=data.imbalance_ratio,
        kind=data.imbalance_type,
        max_per_class=data.max_per_class,
        balanced=data.balanced,
        val_per_class=data.val_per_class,
    )
    return np.bincount(labels[chosen.train], minlength=num_classes)


def _num_classes(config: RunConfig) -> int | None:
    known = _TRAINING_IMAGES.get(config.dataset.source)
    given = config.dataset.num_classes
    if known and given not in (None, len(known)):
        raise ValueError(
            f"dataset.num_classes = {given}: {config.dataset.source} has {len(known)} classes; "
            f"set dataset.num_classes={len(known)} or null"
        )
    return len(known) if known else given


def _stage(
    config: RunConfig,
    name: str,
    shape: MeshShape,
    num_classes: int | None,
    counts: np.ndarray | None,
    costs: dict[int, Costs],
) -> StagePlan:
    """A stage's plan. Where the counts are not known, what two different ones agree on."""
    if counts is not None:
        return _stage_with(config, name, shape, counts, costs, known=True)
    rule = _rule(config, config.method.stages[name])
    guesses = (_guess(num_classes, rule, variant) for variant in (0, 1))
    return _agreed(*(_stage_with(config, name, shape, guess, costs, known=False) for guess in guesses))


def _rule(config: RunConfig, stage: StageConfig) -> GroupRule:
    """The rule that groups a stage's classes, if one does."""
    if stage.classes is not None:
        return stage.classes.rule
    rules = (getattr(part, "groups", None) for part in (stage.objective, config.method.aggregator))
    return next((rule for rule in rules if rule is not None), GroupRule())


def _guess(num_classes: int | None, rule: GroupRule, variant: int) -> np.ndarray:
    """Counts that have a class in each of a rule's groups; another number of them in every variant."""
    size = num_classes or max(rule.cuts or (0,)) + 100 + 7 * variant
    few = max(size // (3 + variant), 1)
    medium = (rule.few_below + rule.many_above) // 2
    values = [rule.many_above + 1] * (size - 2 * few) + [max(medium, 1)] * few + [max(rule.few_below - 1, 1)] * few
    return np.array(values[:size], dtype=np.int64)


def _agreed(a: Any, b: Any) -> Any:
    """What two plans have in common, None elsewhere."""
    if is_dataclass(a) and not isinstance(a, type) and type(a) is type(b):
        same = {field.name: _agreed(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)}
        return type(a)(**same)
    if isinstance(a, dict) and isinstance(b, dict):
        return {name: _agreed(value, b[name]) for name, value in a.items()}
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(_agreed(x, y) for x, y in zip(a, b, strict=True))
    return a if a == b else None


def _stage_with(
    config: RunConfig, name: str, shape: MeshShape, counts: np.ndarray, costs: dict[int, Costs], *, known: bool
) -> StagePlan:
    stage = config.method.stages[name]
    counts_C = counts[stage_classes(config.method, name, counts.tolist())]
    num_classes = len(counts_C)
    if num_classes not in costs:
        costs[num_classes] = costs_of(config, num_classes)
    loads = [rehearse(config, name, counts_C, shape, slot, costs[num_classes]) for slot in range(shape.slots)]
    teachers = {
        teacher: teacher_load(config, source, lambda other: len(stage_classes(config.method, other, counts.tolist())))
        for teacher, source in stage.teachers.items()
    }
    images, steps, last = epoch_of(name, stage, counts_C) if known else (None, None, None)
    work, repeated = _work(stage, shape, loads, teachers)
    flow = piece("flow", stage.flow.name)
    return StagePlan(
        name=name,
        experts=config.method.names_in(name),
        num_classes=num_classes,
        size=_size(loads, costs[num_classes]),
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        shares=shares_of(stage.batch_size, shape.replicas),
        images_per_epoch=images,
        steps_per_epoch=steps,
        last_batch=last,
        learns=tuple(part for part in PARTS if part in flow.learns - set(stage.freeze)),
        exchanges=exchanges(config, stage, shape, loads, teachers),
        memory=_memory(config, stage, shape, loads, teachers),
        work=work,
        repeated=repeated,
        teachers=teachers,
    )


def epoch_of(name: str, stage: StageConfig, counts_C: np.ndarray) -> tuple[int, int, int]:
    """Images and steps of an epoch, and images of its last step."""
    labels = np.repeat(np.arange(len(counts_C)), counts_C)
    images: int = build("sampler", stage.sampler, labels, len(counts_C)).draws_per_epoch
    whole, rest = divmod(images, stage.batch_size)
    if stage.drop_last:
        images, rest = whole * stage.batch_size, 0
    if not images:
        raise ValueError(
            f"method.stages.{name}.batch_size = {stage.batch_size} with drop_last: an epoch has no whole batch; "
            f"lower batch_size"
        )
    return images, whole + (rest > 0), rest or stage.batch_size


def _size(loads: list[Load], costs: Costs) -> Size:
    experts = {name: n for load in loads for name, n in load.parameters.items() if name not in ("trunk", "shared")}
    return Size(
        trunk=loads[0].parameters["trunk"],
        shared=loads[0].parameters["shared"],
        experts=tuple(experts.values()),
        trunk_work=costs.trunk,
        expert_work=costs.features + costs.head,
    )


def _work(
    stage: StageConfig, shape: MeshShape, loads: list[Load], teachers: Teachers
) -> tuple[float | None, float | None]:
    """Multiply-adds per image of a training step on all slots, and the share of forward passes that spread adds."""
    if any(teacher is None for teacher in teachers.values()):
        return None, None
    experts_in = dealt(teachers, shape.slots)
    spread = packed = 0
    for name, teacher in teachers.items():
        assert teacher is not None
        spread += sum(teacher.work(experts) for experts in experts_in[name])
        packed += teacher.work(teacher.num_experts)
    trunks = [load.trunk_work for load in loads]
    here = sum(load.work for load in loads)
    # One trunk sees every stream; trunks that live apart see the same images, or each a stream of its own.
    alone = here - sum(trunks) + (sum(trunks) if piece("flow", stage.flow.name).own_streams else max(trunks))
    work = sum(load.training_work for load in loads) + spread
    return work, (here + spread) / (alone + packed) - 1 if alone + packed else 0.0


def _memory(
    config: RunConfig, stage: StageConfig, shape: MeshShape, loads: list[Load], teachers: Teachers
) -> int | None:
    """Bytes of weights, gradients, momentum, teachers and, with ZeRO, the part of the master weights: the most."""
    if any(teacher is None for teacher in teachers.values()):
        return None
    experts_in = dealt(teachers, shape.slots)
    engine, momentum = config.engine, stage.optimizer.momentum > 0
    most = 0.0
    for slot, load in enumerate(loads):
        total: float = sum(load.parameters.values())
        total += sum(teacher.held(experts_in[name][slot]) for name, teacher in teachers.items() if teacher)
        for part, groups in load.learning.items():
            among = shape.replicas if part == "experts" else shape.workers
            if engine.name == "torch":
                copies = 1.0 + momentum
            else:
                copies = (1.0 if engine.zero_stage == 1 else 1 / among) + (1 + momentum) / among
            total += copies * sum(groups)
        most = max(most, total)
    return round(most * number_bytes(config))


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
