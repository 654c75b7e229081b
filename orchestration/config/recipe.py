"""The schema of a recipe, and the checks that its parts fit together.

First the schema, from optimiser to method. Then `recipe_problems`, which validates a `MethodConfig`:
names of experts, flow and objective, teachers, what learns, order of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema

import aggregation
import experts
from experts.class_groups import GroupRule, split_classes
from experts.ensemble import check_names
from experts.flows.plain import Plain
from experts.registry import Settings, choice, import_pieces, piece, registered_names

import_pieces(experts, aggregation)  # the fields below accept the config of any registered piece


class PieceOf:
    """Marks a field for the config of any registered piece of one kind; its `name` says which."""

    def __init__(self, kind: str, *, optional: bool = False) -> None:
        self.kind = kind
        self.optional = optional

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        chosen = choice(self.kind)
        return handler.generate_schema(chosen | None if self.optional else chosen)


class OptimizerConfig(Settings):
    """SGD, the optimiser of every published method here."""

    lr: Annotated[float, Field(gt=0)]
    """Base learning rate, multiplied by the stage's lr_schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty on every trainable parameter including BatchNorm's, as published."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum > 0; set momentum, or nesterov = false")
        return self


class ModelSource(Settings):
    """A trained ensemble, from a stage of this run or from another run."""

    stage: str | None = None
    """An earlier stage of this run."""
    run: str | None = None
    """Folder of a finished run."""
    weights: Literal["last", "best"] = "last"
    """Which of its two models."""

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelSource:
        if (self.stage is None) == (self.run is None):
            raise ValueError(
                f"stage = {self.stage}, run = {self.run}: needed exactly one of them: stage (an earlier one of this "
                f"run) or run (the folder of another)"
            )
        return self


class Teacher(ModelSource):
    """A frozen ensemble whose scores a stage learns from."""

    mode: Literal["eval", "train"] = "eval"
    """"train" normalises with the statistics of each batch, as RIDE's published code does by oversight."""


class ClassSubset(Settings):
    """The classes that a stage knows: its images and its logits are of these alone."""

    group: Literal["many", "medium", "few"]
    rule: GroupRule = GroupRule()
    """How classes are divided into the three groups."""


class Mixup(Settings):
    """Blends every training image with another one of its batch, and their losses with the same weights.

    Source: Zhang et al. 2018, arXiv:1710.09412.
    """

    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The share of the first image is drawn from Beta(alpha, alpha), once per batch."""


Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LrFactors(Settings):
    """Factors of the learning rate for each part of the ensemble, no unit. An objective may have a further factor for
    each expert; the two are multiplied."""

    trunk: Factor = 1.0
    features: Factor = 1.0
    heads: Factor = 1.0


class StageConfig(Settings):
    """One training job."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    """Images per optimiser step over all workers; never changes with placement."""
    optimizer: OptimizerConfig
    lr_schedule: Annotated[Any, PieceOf("lr_schedule")]
    sampler: Annotated[Any, PieceOf("sampler")]
    objective: Annotated[Any, PieceOf("objective")]
    drop_last: bool = False
    """Leave out the partial last batch of every epoch. Published CIFAR code keeps it."""
    flow: Annotated[Any, PieceOf("flow")] = Plain.Config()
    """How images become the outputs that the objective sees."""
    partner_sampler: Annotated[Any, PieceOf("sampler", optional=True)] = None
    """Sampler of a second batch, paired with the first row by row, for flows that need one."""
    mixup: Mixup | None = None
    freeze: tuple[Literal["trunk", "features", "heads"], ...] = ()
    """Parts that do not learn in this stage."""
    lr_factors: LrFactors = LrFactors()
    """Published for Places-LT with pretrained weights: trunk and features at a tenth of the heads' rate."""
    frozen_batchnorm: Literal["eval", "train"] = "eval"
    """BatchNorm of frozen parts: "eval" uses running statistics, "train" the batch's and updates the running ones."""
    teachers: dict[str, Teacher] = Field(default_factory=dict)
    """By name. An objective or a distillation that learns from teachers says which names it knows."""
    distillation: Annotated[Any, PieceOf("distillation", optional=True)] = None
    after: tuple[str, ...] | None = None
    """Stages that must end before this one starts. Unset: the previous one. Stages that do not wait for each other
    train side by side if the cluster has room, each on its own workers."""
    start_from: ModelSource | None = None
    """Initial weights. Unset: those of the previous stage if `after` is unset, otherwise new ones."""
    classes: ClassSubset | None = None
    """Classes that the stage knows. Unset: all."""
    aggregator: Annotated[Any, PieceOf("aggregator", optional=True)] = None
    """How the experts are combined from this stage on. Unset: the method's rule."""
    experts: tuple[str, ...] | None = None
    """Names of this stage's experts if they are not the method's: another ensemble of the same architecture."""


class Expected(Settings):
    """A published result and its conditions. Shown beside a run only if the run meets every condition."""

    top1: dict[str, float]
    """Top-1 accuracy in percent, by group."""
    remark: str
    """Where the number comes from: source, the split that chose the epoch, what the recipe here lacks."""
    conditions: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the config and the values that they must have."""


class MethodConfig(Settings):
    """A recipe: the experts, the stages that train them, and how they are combined at test time."""

    name: str
    num_experts: Annotated[int, Field(ge=1, le=8)]
    reduce_dimension: bool = False
    """Thinner late stages as in RIDE: 24 and 48 channels instead of 32 and 64."""
    head: Annotated[Any, PieceOf("head")]
    aggregator: Annotated[Any, PieceOf("aggregator")]
    experts: tuple[str, ...] | None = None
    """Names of the experts, in the order of the logits. Unset: expert0, expert1, ..."""
    shared_head: bool = False
    """One head for all experts, as in ResLT."""
    router: Annotated[Any, PieceOf("router", optional=True)] = None
    """Decides for each image how many experts to run, once a stage has trained it."""
    backbone_weights: str | None = None
    """Pretrained weights for new networks, a file written by `expertail import-weights`. Unset: random weights."""
    stages: Annotated[dict[str, StageConfig], Field(min_length=1)]
    expected: Expected | None = None
    """The published result of this recipe on this data; used by reports only."""

    @model_validator(mode="after")
    def _pieces_fit(self) -> MethodConfig:
        problems = list(dict.fromkeys(recipe_problems(self)))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def expert_names(self) -> tuple[str, ...]:
        return self.experts or tuple(f"expert{i}" for i in range(self.num_experts))

    def names_in(self, stage: str) -> tuple[str, ...]:
        """Return the names of the experts that a stage trains."""
        return self.stages[stage].experts or self.expert_names

    def aggregator_in(self, stage: str) -> Any:
        """Return the rule that combines a stage's experts."""
        return self.stages[stage].aggregator or self.aggregator

    @property
    def final(self) -> str:
        """The stage that trains the run's result: the last."""
        return list(self.stages)[-1]

    def waits_for(self, stage: str) -> tuple[str, ...]:
        """Return the stages that must end before a stage starts."""
        names = list(self.stages)
        place = names.index(stage)
        after = self.stages[stage].after
        return tuple(names[place - 1 : place]) if after is None else after

    def starts_from(self, stage: str) -> ModelSource | None:
        """Return the initial weights of a stage; None for new ones."""
        config = self.stages[stage]
        before = self.waits_for(stage)
        if config.start_from is None and config.after is None and before:
            return ModelSource(stage=before[0])
        return config.start_from

    def waves(self) -> list[list[str]]:
        """Group stages into waves: those of one wave may train side by side, once the waves before have ended."""
        waves: list[list[str]] = []
        done: set[str] = set()
        # Ends: a stage waits for earlier ones only, so the first that is left can always go.
        while len(done) < len(self.stages):
            waves.append([s for s in self.stages if s not in done and done.issuperset(self.waits_for(s))])
            done.update(waves[-1])
        return waves


def stage_classes(method: MethodConfig, stage: str, counts: list[int]) -> list[int]:
    """Return the class ids that a stage knows, in the order of its logits."""
    subset = method.stages[stage].classes
    if subset is None:
        return list(range(len(counts)))
    groups = dict(zip(("many", "medium", "few"), split_classes(np.asarray(counts), 3, subset.rule), strict=True))
    return groups[subset.group].tolist()


def recipe_problems(method: MethodConfig) -> Iterator[str]:
    """Yield every problem of a recipe. A problem begins with its key, relative to `method`."""
    yield from _names_problems("experts", method.experts, method.num_experts)
    earlier: list[str] = []  # a stage may refer to these alone, so nothing can wait in a circle
    for name, stage in method.stages.items():
        found = [*_stage_problems(name, stage, method, earlier), *_learning_problems(name, stage, method)]
        yield from (f"stages.{name}.{problem}" for problem in found)
        yield from _rule_problems(name, method, earlier)
        earlier.append(name)
    if method.router is not None and not any(_trains_router(stage) for stage in method.stages.values()):
        yield f"router: no stage trains it; add one with {_router_flow()}, or set it to null"
    if method.backbone_weights is not None and all(method.starts_from(name) for name in method.stages):
        yield "backbone_weights: every stage has start_from, so no network starts from it; set it to null"


def _names_problems(key: str, names: tuple[str, ...] | None, num_experts: int) -> Iterator[str]:
    if names is None:
        return
    if len(names) != num_experts:
        yield f"{key} = {list(names)}: {len(names)} names; needed {num_experts}, as num_experts says; change either"
    try:
        check_names(names)
    except ValueError as problem:
        yield f"{key}: {problem}"


def _rule_problems(name: str, method: MethodConfig, earlier: list[str]) -> Iterator[str]:
    """Yield why the rule that combines a stage's experts does not fit the experts."""
    rule = method.aggregator_in(name)
    yield from _refusal(rule.check_head, method.head)
    yield from _refusal(rule.check_experts, method.names_in(name))
    needs_router = piece("aggregator", rule.name).needs_router
    if needs_router and not any(_trains_router(method.stages[stage]) for stage in (*earlier, name)):
        yield (
            f"stages.{name}.aggregator = {rule.name}: no router is trained by then; needed a stage with "
            f"{_router_flow()}; set aggregator.name={_one_of('aggregator', lambda other: not other.needs_router)}"
        )


def _refusal(check: Callable[[Any], None], against: Any) -> Iterator[str]:
    """Yield what a piece's own check says against another piece."""
    try:
        check(against)
    except ValueError as problem:
        yield str(problem)


def _one_of(kind: str, fits: Callable[[Any], bool] = lambda piece: True) -> str:
    """List the pieces of a kind that would do."""
    return " or ".join(name for name in registered_names(kind) if fits(piece(kind, name)))


def _router_flow() -> str:
    """Name the flow that trains a router, and a recipe that has it."""
    flows = {name: piece("flow", name) for name in registered_names("flow")}
    name, flow = next((name, flow) for name, flow in flows.items() if "gates" in flow.learns)
    return f"flow '{name}'" + (f", as method={flow.recipe} has it" if flow.recipe else "")


def _trains_router(stage: StageConfig) -> bool:
    return "gates" in piece("flow", stage.flow.name).learns


def _stage_problems(name: str, stage: StageConfig, method: MethodConfig, earlier: list[str]) -> Iterator[str]:
    yield from _refusal(stage.objective.check_head, method.head)
    yield from _names_problems("experts", stage.experts, method.num_experts)
    yield from _flow_problems(stage, method)
    yield from _teacher_problems(stage, method)
    started = (stage.start_from.stage,) if stage.start_from and stage.start_from.stage else ()
    taught = tuple(teacher.stage for teacher in stage.teachers.values() if teacher.stage)
    for key, names in (("after", stage.after or ()), ("start_from.stage", started), ("teachers", taught)):
        for other in names:
            if other not in earlier:
                yield f"{key} = {other}: needed an earlier stage of the recipe: {', '.join(earlier) or 'there is none'}"


def _flow_problems(stage: StageConfig, method: MethodConfig) -> Iterator[str]:
    flow, objective = piece("flow", stage.flow.name), piece("objective", stage.objective.name)
    flow_is = f"flow '{stage.flow.name}'"
    if flow.needs_partner and stage.partner_sampler is None:
        yield f"partner_sampler: not set; {flow_is} pairs every batch with a second one; set a sampler"
    if not flow.needs_partner and stage.partner_sampler is not None:
        yield f"partner_sampler = {stage.partner_sampler.name}: {flow_is} takes one batch only; set it to null"
    pairing = flow.pairing_problem(objective)
    if pairing is not None:
        yield pairing
    if "gates" in flow.learns and (method.router is None or method.num_experts < 2):
        yield (
            f"{flow_is}: the ensemble has no router to train; needed method.router and 2 experts or more, found "
            f"method.router {'unset' if method.router is None else 'set'} and method.num_experts = "
            f"{method.num_experts}; set method.router.name={_one_of('router')}"
        )
    head = piece("head", method.head.name)
    if head.flow not in (None, stage.flow.name):
        yield (
            f"{flow_is}: method.head.name = {method.head.name} is for flow '{head.flow}'; set method.head.name to "
            f"{_one_of('head', lambda other: other.flow is None)}"
        )
    if flow.needs_own_heads and method.shared_head:
        yield f"{flow_is}: method.shared_head = true; needed a head in each expert; set method.shared_head=false"
    yield from _refusal((stage.aggregator or method.aggregator).check_objective, stage.objective)
    if stage.mixup is not None and flow.needs_partner:
        yield f"mixup: {flow_is} pairs batches already; set mixup=null"
    number = objective.number_problem(method.num_experts)
    if number is not None:
        yield number


def _learning_problems(name: str, stage: StageConfig, method: MethodConfig) -> Iterator[str]:
    learns, flow_is = piece("flow", stage.flow.name).learns, f"flow '{stage.flow.name}'"
    learning = learns - set(stage.freeze)
    if not learning:
        yield f"freeze = {list(stage.freeze)}: nothing is left to learn; {flow_is} trains {sorted(learns)}"
    for part, factor in stage.lr_factors.model_dump().items():
        if factor != 1 and part not in learning:
            yield f"lr_factors.{part} = {factor:g}: it does not learn in this stage; set it to 1"
    kept = [part for part in ("trunk", "features") if part not in learning]
    if kept and method.starts_from(name) is None and method.backbone_weights is None:
        yield (
            f"start_from: not set, and no stage comes before; {' and '.join(kept)} would stay at random weights, since "
            f"{flow_is} with freeze = {list(stage.freeze)} does not train them; set start_from.run=<folder of a "
            f"finished run>, or put a stage before that trains them"
        )


def _teacher_problems(stage: StageConfig, method: MethodConfig) -> Iterator[str]:
    wanted = stage.objective.teacher_names
    if wanted is not None:
        for name, teacher in stage.teachers.items():
            source = method.stages.get(teacher.stage) if teacher.stage else None
            subset = source.classes if source else None
            rule = stage.objective.group_rule
            if subset is not None and subset.rule != rule:
                yield (
                    f"objective.groups = {rule}, but its teacher's stage has stages.{teacher.stage}.classes.rule = "
                    f"{subset.rule}; needed the same; set both"
                )
            if teacher.mode == "train":
                yield f"teachers.{name}.mode = train: its scores would depend on the batch; set it to eval"
        if set(wanted) != set(stage.teachers):
            yield (
                f"teachers = {sorted(stage.teachers)}: objective '{stage.objective.name}' needs {sorted(wanted)}; set "
                f"teachers.<name>.run or .stage for each"
            )
    elif stage.teachers and stage.distillation is None:
        yield (f"teachers: nothing learns from them; set distillation.name={_one_of('distillation')}, or remove them")
    elif stage.distillation is not None and not stage.teachers:
        yield "distillation: there is no teacher; set teachers.teacher.run=<folder of a finished run>"
