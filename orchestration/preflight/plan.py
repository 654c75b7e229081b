"""Plan a run: which worker holds what, what crosses the network, what it costs. A function of the config.

Nothing is started and no image is read. Folders and lists of images are counted where they lie on this machine; else
their sizes stay open (None). The work of one step is measured by rehearsing it on blank images (rehearsal.py) and
distributed over the mesh here. plan_text.py prints the result.

Letters: E experts in all, e in one slot, S expert slots, R replicas, W = S R workers, B images, C classes, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from experts.class_groups import GroupRule
from experts.flow import PARTS
from experts.registry import build, piece
from orchestration.cluster.placement import bundle_of, check_fits, shape_of
from orchestration.config.recipe import StageConfig, stage_classes
from orchestration.config.recipe_checks import parts_that_learn
from orchestration.config.run_config import RunConfig
from orchestration.preflight.blanks import blank_teachers
from orchestration.preflight.expected_data import ExpectedData, expected_data
from orchestration.preflight.rehearsal import Costs, Load, rehearse, size_without_steps
from orchestration.preflight.traffic import Exchange, exchanges, shares_of
from orchestration.training.mesh import MeshShape

WORKER_GIB = (0.8, 1.5)
"""Memory of a worker's process without weights, GiB; measured: digits on ResNet-8, CIFAR JPEGs on ResNet-32."""


@dataclass(frozen=True)
class Size:
    """Parameters of an ensemble, and multiply-adds per image in a forward pass; None where they need C.

    Attributes:
        trunk, shared: parameters before and after the experts.
        experts: parameters of each expert. A gate, or a bias that only one expert has, makes them differ.
        trunk_work, expert_work: multiply-adds. A shared head counts once for each expert.
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
class TeacherSize:
    """Experts and classes of a teacher."""

    num_experts: int
    num_classes: int


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run; None where only the data can say.

    Attributes:
        experts: names, in the order of the logits.
        num_classes: classes that the stage knows.
        shares: images of a batch on each replica.
        learns: parts of the ensemble that learn.
        exchanges: of one step; empty with one worker or without steps.
        memory: bytes of weights, gradients, optimiser state and teachers on the worker that holds most.
        work: multiply-adds of a training step per image, over all slots and with teachers. An image and its partner
            count as one.
        work_before: multiply-adds per training image before the first step, over all workers, where features are
            computed once for all steps; else 0.
        work_each_epoch: the same before every epoch, where auxiliaries look at all training images.
        auxiliary_bytes: of auxiliaries and copies of the network, on the worker that holds most; `memory` has them too.
        slot_work: multiply-adds of a training step per image, by slot; `work` is their sum.
        slot_calls: functions of torch that a step calls, by slot, as `Load.calls`.
        repeated: multiply-adds that a spread placement adds to the forward pass, as a share of the packed one's.
        teachers: by name; None where the run is missing, or only the data can say.
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
    work_before: float
    work_each_epoch: float
    auxiliary_bytes: int
    slot_work: tuple[float, ...] | None
    slot_calls: tuple[int, ...]
    repeated: float | None
    teachers: dict[str, TeacherSize | None]

    def sent(self) -> int | None:
        """Return the bytes that a worker sends per step, for the slot that sends most."""
        slots = range(len(self.exchanges[0].payloads)) if self.exchanges else range(0)
        sums = [_sum([exchange.sent(slot) for exchange in self.exchanges]) for slot in slots]
        return None if None in sums else max(sums, default=0)  # type: ignore[type-var]


@dataclass(frozen=True)
class Plan:
    """A run's placement and cost.

    Attributes:
        shape: mesh of every stage.
        num_classes: C; None if only the data can say.
        counts: training images per class; None if only the data can say.
        remarks: what of the data is cut, held out, skipped or looks wrong.
        stages: in the order of the recipe.
        waves: stages that may train side by side, wave after wave.
        side_by_side: the most stages that train at once, each on its own workers, where the cluster has room.
    """

    shape: MeshShape
    num_classes: int | None
    counts: tuple[int, ...] | None
    remarks: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    waves: tuple[tuple[str, ...], ...]
    side_by_side: int

    @property
    def final(self) -> StagePlan:
        return self.stages[-1]

    @property
    def memory(self) -> int | None:
        """Bytes on one worker in the stage that needs most."""
        bytes_ = [stage.memory for stage in self.stages]
        return None if None in bytes_ else max(bytes_)  # type: ignore[type-var]

    def experts_on(self, rank: int, stage: StagePlan | None = None) -> tuple[str, ...]:
        """Return the names of a worker's experts, by default in the last stage."""
        names = (stage or self.final).experts
        return tuple(names[i] for i in self.shape.experts_of(self.shape.position(rank)[0]))


def plan(
    config: RunConfig,
    nodes: Mapping[str, Mapping[str, float]] | None = None,
    slots: range | None = None,
    counts: Sequence[int] | None = None,
) -> Plan:
    """Plan a run.

    Args:
        config: validated. `cluster.experts_per_worker=auto` stands for the first number that fits.
        nodes: resources by node, as Ray names them. If given, a placement that does not fit them is refused.
        slots: those to rehearse, from 0 on; all by default. Whatever is a sum over slots is of these alone.
        counts: training images per class, of a run that has opened its data; None for those that are expected.

    Raises:
        ValueError: experts and workers do not fit, the data set has too few images for the counts asked for, a group
            of the method has no class, or the nodes have too little room.
    """
    shape = shape_of(config.method.num_experts, config.cluster)
    if nodes is not None and config.cluster.cpus_per_worker is not None:
        check_fits(shape.workers, bundle_of(config.cluster, config.cluster.cpus_per_worker), nodes)
    data = expected_data(config) if counts is None else ExpectedData(len(counts), np.array(counts, dtype=np.int64))
    waves = tuple(tuple(wave) for wave in config.method.waves())

    return Plan(
        shape=shape,
        num_classes=data.num_classes,
        counts=None if data.counts_C is None else tuple(data.counts_C.tolist()),
        remarks=tuple(remark.text for remark in data.remarks),
        stages=tuple(
            _stage(config, name, shape, data.num_classes, data.counts_C, slots) for name in config.method.stages
        ),
        waves=waves,
        side_by_side=config.side_by_side,
    )


def _stage(
    config: RunConfig,
    name: str,
    shape: MeshShape,
    num_classes: int | None,
    counts: np.ndarray | None,
    slots: range | None,
) -> StagePlan:
    """Plan a stage. Where the counts are unknown, assume some, and leave open every number that depends on them."""
    stage = config.method.stages[name]
    if counts is not None:
        return _stage_with(config, name, shape, counts, slots, known=True)
    counts = _assumed_counts(num_classes, _rule(config, stage))
    assumed = _stage_with(config, name, shape, counts, slots, known=False)
    return _without_classes(assumed) if num_classes is None or stage.classes is not None else assumed


def _without_classes(stage: StagePlan) -> StagePlan:
    """Leave open what needs the number of classes: heads, scores and their sums."""
    size = replace(stage.size, shared=None, experts=(None,) * len(stage.experts), expert_work=None)
    unknown = (None,) * len(stage.exchanges[0].payloads) if stage.exchanges else ()
    return replace(
        stage,
        num_classes=None,
        size=size,
        exchanges=tuple(replace(exchange, payloads=unknown) for exchange in stage.exchanges),
        memory=None,
        work=None,
        slot_work=None,
        repeated=None,
    )


def _rule(config: RunConfig, stage: StageConfig) -> GroupRule:
    """Return the rule that groups a stage's classes, or the default one."""
    if stage.classes is not None:
        return stage.classes.rule
    parts = (stage.objective, config.method.aggregator)
    rules = (part.group_rule for part in parts if part is not None)
    return next((rule for rule in rules if rule is not None), GroupRule())


def blank_counts(config: RunConfig, stage: str) -> np.ndarray:
    """Return training images per class, int64 [C]: those that are expected, or else assumed ones."""
    data = expected_data(config)
    if data.counts_C is not None:
        return data.counts_C
    return _assumed_counts(data.num_classes, _rule(config, config.method.stages[stage]))


def _assumed_counts(num_classes: int | None, rule: GroupRule) -> np.ndarray:
    """Return counts, int64 [C], with a class in each of a rule's groups."""
    # Enough classes for the cuts of a rule by index, and counts on either side of its limits.
    size = num_classes or max(rule.cuts or (0,)) + 100
    few = max(size // 3, 1)
    medium = (rule.few_below + rule.many_above) // 2
    values = [rule.many_above + 1] * (size - 2 * few) + [max(medium, 1)] * few + [max(rule.few_below - 1, 1)] * few
    return np.array(values[:size], dtype=np.int64)


def _stage_with(
    config: RunConfig, name: str, shape: MeshShape, counts: np.ndarray, slots: range | None, *, known: bool
) -> StagePlan:
    stage = config.method.stages[name]
    counts_C = counts[stage_classes(config.method, name, counts.tolist())]
    if not stage.epochs:
        return _without_steps(config, name, shape, len(counts_C))
    assert stage.batch_size is not None
    images, steps, last = epoch_of(name, stage, counts_C) if known else (None, None, None)
    teachers = blank_teachers(config, name, counts, counts_known=known)
    loads, costs = rehearse(config, name, counts, shape, teachers, counts_known=known, slots=slots)
    unknown = [teacher for teacher, blank in teachers.items() if not blank.known]
    work, repeated = (None, None) if unknown else _work(stage, loads)
    shares = shares_of(stage.batch_size, shape.replicas)
    learns = parts_that_learn(config.method, name)
    return StagePlan(
        name=name,
        experts=config.method.names_in(name),
        num_classes=len(counts_C),
        size=_size([load.parameters for load in loads], costs),
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        shares=shares,
        images_per_epoch=images,
        steps_per_epoch=steps,
        last_batch=last,
        learns=tuple(part for part in PARTS if part in learns),
        exchanges=exchanges(loads, shares[0], unknown),
        memory=None if unknown else _memory(config, stage, shape, loads),
        work=work,
        work_before=shape.replicas * sum(load.work_before for load in loads),
        work_each_epoch=sum(load.work_each_epoch for load in loads),  # replicas divide the images
        auxiliary_bytes=max(load.auxiliary_bytes for load in loads),
        slot_work=None if unknown else tuple(load.training_work for load in loads),
        slot_calls=tuple(load.calls for load in loads),
        repeated=repeated,
        teachers={
            teacher: TeacherSize(blank.num_experts, blank.num_classes) if blank.known else None
            for teacher, blank in teachers.items()
        },
    )


def _without_steps(config: RunConfig, name: str, shape: MeshShape, num_classes: int) -> StagePlan:
    """Plan a stage without steps: its ensemble, which exchanges nothing but what an evaluation does."""
    held, costs = size_without_steps(config, name, num_classes)
    own = [
        held["trunk"] + held["shared"] + sum(list(held.values())[2:][i] for i in shape.experts_of(slot))
        for slot in range(shape.slots)
    ]
    return StagePlan(
        name=name,
        experts=config.method.names_in(name),
        num_classes=num_classes,
        size=_size([held], costs),
        epochs=0,
        batch_size=0,
        shares=(),
        images_per_epoch=0,
        steps_per_epoch=0,
        last_batch=0,
        learns=(),
        exchanges=(),
        memory=_number_bytes(config) * max(own),
        work=0.0,
        work_before=0.0,
        work_each_epoch=0.0,
        auxiliary_bytes=0,
        slot_work=(),
        slot_calls=(),
        repeated=0.0,
        teachers={},
    )


def size_of(config: RunConfig, stage: str, num_classes: int) -> Size:
    """Return the size of a stage's ensemble as a plan has it, without rehearsing a step, which takes far longer."""
    held, costs = size_without_steps(config, stage, num_classes)
    return _size([held], costs)


def epoch_of(name: str, stage: StageConfig, counts_C: np.ndarray) -> tuple[int, int, int]:
    """Return the images and steps per epoch, and the images of its last step.

    Raises:
        ValueError: no batch is full and drop_last leaves out partial ones.
    """
    # The sampler itself knows how many images it draws per epoch; it depends on labels alone.
    assert stage.batch_size is not None
    labels = np.repeat(np.arange(len(counts_C)), counts_C)
    images: int = build("sampler", stage.sampler, labels, len(counts_C)).draws_per_epoch
    full, rest = divmod(images, stage.batch_size)
    if stage.drop_last:
        images, rest = full * stage.batch_size, 0
    if not images:
        raise ValueError(
            f"method.stages.{name}.batch_size = {stage.batch_size} with drop_last: an epoch has no full batch; "
            f"lower batch_size"
        )
    return images, full + (rest > 0), rest or stage.batch_size


def _size(held: list[dict[str, int]], costs: Costs) -> Size:
    # Every slot holds the same trunk and shared head, and experts of its own.
    experts = {name: n for slot in held for name, n in slot.items() if name not in ("trunk", "shared")}
    return Size(
        trunk=held[0]["trunk"],
        shared=held[0]["shared"],
        experts=tuple(experts.values()),
        trunk_work=costs.trunk,
        expert_work=costs.features + costs.head,
    )


def _work(stage: StageConfig, loads: list[Load]) -> tuple[float, float]:
    """Return the multiply-adds per image of a training step over all slots, and the share that spreading adds to the
    forward pass."""
    here = sum(load.work for load in loads)
    alone = here
    for name in {name for load in loads for name in load.trunk_work}:
        # Packed, one trunk sees every stream. Spread, every slot has a trunk: all see the same images, which repeats
        # its work, or each sees its own stream. The trunks of teachers (named) always see the same.
        if name or not piece("flow", stage.flow.name).own_streams:
            trunks = [load.trunk_work.get(name, 0.0) for load in loads]
            alone -= sum(trunks) - max(trunks)
    return sum(load.training_work for load in loads), here / alone - 1 if alone else 0.0


def _memory(config: RunConfig, stage: StageConfig, shape: MeshShape, loads: list[Load]) -> int:
    """Return the bytes of weights, gradients, momentum, teachers, auxiliaries and, with ZeRO, the worker's share of the
    master weights, for the slot that holds most."""
    assert stage.optimizer is not None
    engine, momentum = config.engine, stage.optimizer.momentum > 0
    most = 0.0
    for load in loads:
        total: float = sum(load.parameters.values()) + load.teacher_parameters
        for part, groups in load.learning.items():
            # Weights are counted above. Torch adds gradients and momentum. ZeRO splits master weights and momentum, and
            # at stage 2 gradients too, over the workers that share the parameters.
            among = shape.replicas if part == "experts" else shape.workers
            if engine.chosen(shape.workers) == "torch":
                copies = 1.0 + momentum
            else:
                copies = (1.0 if engine.zero_stage == 1 else 1 / among) + (1 + momentum) / among
            total += copies * sum(groups)
        total += load.auxiliary_bytes / _number_bytes(config)
        most = max(most, total)
    return round(most * _number_bytes(config))


def _number_bytes(config: RunConfig) -> int:
    return 8 if config.engine.precision == "float64" else 4


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
