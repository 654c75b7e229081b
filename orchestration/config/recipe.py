"""The schema of a recipe: what a stage is made of, what a method is made of, and what follows from the two.

recipe_checks.py says why the parts of a recipe do not fit together; method.py applies it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

import aggregation
import experts
from experts.class_groups import GroupRule, split_classes
from experts.data.config import Augment
from experts.flows.plain import Plain
from experts.losses.class_weights import ClassWeights
from experts.ramps import Weight, constant
from experts.registry import PieceOf, Settings, import_pieces, piece
from orchestration.config.paths import SIBLING, expand, sibling_of

import_pieces(experts, aggregation)  # the fields below accept the config of any registered piece


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
    """Folder of a finished run; `sibling:NAME` is the run NAME in the same run.dir."""
    final: str | None = None
    """Which of that run's final stages, where it has several. Unset: its last stage."""
    weights: Literal["last", "best"] = "last"
    """Which of its two models."""

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelSource:
        if (self.stage is None) == (self.run is None):
            raise ValueError(
                f"stage = {self.stage}, run = {self.run}: needed exactly one of them: stage (an earlier one of this "
                f"run) or run (the folder of another)"
            )
        if self.final is not None and self.run is None:
            raise ValueError(f"final = {self.final}: names a stage of another run; set run, or remove it")
        if self.sibling is not None and not re.fullmatch(r"\w[\w.+-]*", self.sibling):
            raise ValueError(f"run = {self.run}: needed {SIBLING}NAME, another run of the same run.dir by its name")
        return self

    @property
    def sibling(self) -> str | None:
        """Name of the run, where it lies in the run.dir of the run that names it; None of any other."""
        return None if self.run is None else sibling_of(self.run)

    def folder(self, run_dir: str) -> Path:
        """Return the folder of another run, absolute.

        Args:
            run_dir: of the run that names it.
        """
        assert self.run is not None
        return Path(os.path.abspath(expand(self.run) if self.sibling is None else expand(run_dir) / self.sibling))

    @property
    def export(self) -> str:
        """Where the model lies in the folder of another run."""
        return "/".join(filter(None, ("export", self.final, self.weights)))


class Teacher(ModelSource):
    """A frozen ensemble whose scores a stage learns from."""

    mode: Literal["eval", "train"] = "eval"
    """"train" normalises with the statistics of each batch, as RIDE's published code does by oversight."""


class ClassSubset(Settings):
    """The classes that a stage knows: its images and its logits are of these alone."""

    group: Literal["many", "medium", "few"]
    rule: GroupRule = GroupRule()
    """How classes are divided into the three groups."""


Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LrFactors(Settings):
    """Factors of the learning rate for each part of the ensemble, no unit. An objective may have a further factor for
    each expert; the two are multiplied."""

    trunk: Factor = 1.0
    features: Factor = 1.0
    attention: Factor = 1.0
    heads: Factor = 1.0
    memory: Factor = 1.0
    calibration: Factor = 1.0
    auxiliaries: Factor = 1.0


Part = Literal["trunk", "features", "attention", "heads", "memory", "calibration"]
Learning = Literal["trunk", "features", "attention", "heads", "memory", "calibration", "auxiliaries"]


class StageConfig(Settings):
    """One training job; or, without steps, another head, rule or choice for experts that are trained already."""

    epochs: Annotated[int, Field(ge=0)]
    """0 is a stage without steps. It needs none of the next five keys, which every other stage must have."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images per optimiser step over all workers; never changes with placement."""
    optimizer: OptimizerConfig | None = None
    lr_schedule: Annotated[Any, PieceOf("lr_schedule", optional=True)] = None
    sampler: Annotated[Any, PieceOf("sampler", optional=True)] = None
    objective: Annotated[Any, PieceOf("objective", optional=True)] = None
    objective_weight: Weight = constant(1.0)
    """Factor of the objective beside auxiliaries and distillation, no unit: a number or a ramp (experts/ramps.py)."""
    class_weights: ClassWeights | None = None
    """Weights of the classes in the objective, a mean over images then; late in training it is deferred re-weighting
    (DRW)."""
    drop_last: bool = False
    """Leave out the partial last batch of every epoch. Published CIFAR code keeps it."""
    flow: Annotated[Any, PieceOf("flow")] = Plain.Config()
    """How images become the outputs that the objective sees."""
    partner_sampler: Annotated[Any, PieceOf("sampler", optional=True)] = None
    """Sampler of a second batch, paired with the first row by row, for flows that need one."""
    mixing: Annotated[Any, PieceOf("mixing", optional=True)] = None
    """Mixing of images with others, and of their labels."""
    auxiliaries: dict[str, Annotated[Any, PieceOf("auxiliary")]] = Field(default_factory=dict)
    """Losses and memories of the experts beside the objective, by a name of their own; for this stage alone."""
    augment: Augment | None = None
    """Random changes of images, instead of `dataset.augment`: a stack by name, pieces or keys."""
    views: tuple[Augment, ...] = ()
    """Further views of every image, each a stack like `augment`, for objectives and auxiliaries that compare them."""
    head: Annotated[Any, PieceOf("head", optional=True)] = None
    """The experts' head from this stage on. Unset: that of the stage whose weights this one begins with, or the
    method's."""
    calibration: Annotated[Any, PieceOf("calibration", optional=True)] = None
    """Calibration of the heads' scores from here on. Unset: as in the stage whose weights this one begins with, and
    nothing on new heads."""
    reinit: tuple[Part, ...] = ()
    """Parts that begin with new weights, whatever the weights of `start_from` hold."""
    freeze: tuple[Learning, ...] = ()
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

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Trained ensembles that it says it begins with or learns from."""
        return (*self.teachers.values(), *([self.start_from] if self.start_from else []))


class Expected(Settings):
    """A published result and its conditions. Shown beside a run only if the run meets every condition."""

    top1: dict[str, float]
    """Top-1 accuracy in percent, by group."""
    remark: str
    """Where the number comes from: source, the split that chose the epoch, what the recipe here lacks."""
    conditions: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the config and the values that they must have."""


class Recipe(Settings):
    """The experts, the stages that train them, and how they are combined at test time, as they are written."""

    name: str
    like: str | None = None
    """Folder of a saved run whose backbone, experts and head this recipe goes on from. Composing fills them in."""
    like_final: str | None = None
    """Which of that run's final stages. Unset: its last stage."""
    num_experts: Annotated[int, Field(ge=1, le=8)]
    reduce_dimension: bool = False
    """Thinner late stages as in RIDE: 24 and 48 channels instead of 32 and 64."""
    head: Annotated[Any, PieceOf("head")]
    aggregator: Annotated[Any, PieceOf("aggregator")]
    calibration: Annotated[Any, PieceOf("calibration", optional=True)] = None
    """Calibration of the heads' scores, where the recipe goes on from a saved run that has it."""
    attention: Annotated[Any, PieceOf("attention", optional=True)] = None
    """Attention on every expert's last map, before the mean over its positions, in every stage. A stage that freezes it
    keeps it as the stage begins."""
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

    @property
    def expert_names(self) -> tuple[str, ...]:
        return self.experts or tuple(f"expert{i}" for i in range(self.num_experts))

    def names_in(self, stage: str) -> tuple[str, ...]:
        """Return the names of the experts that a stage trains."""
        return self.stages[stage].experts or self.expert_names

    def aggregator_in(self, stage: str) -> Any:
        """Return the rule that combines a stage's experts."""
        return self.stages[stage].aggregator or self.aggregator

    def head_in(self, stage: str) -> Any:
        """Return the config of the experts' head in a stage."""
        before = self.stage_before(stage)
        return self.stages[stage].head or (self.head if before is None else self.head_in(before))

    def calibration_in(self, stage: str) -> Any:
        """Return the config of what calibrates the heads' scores in a stage; None for nothing."""
        config, before = self.stages[stage], self.stage_before(stage)
        if config.calibration is not None or "heads" in config.reinit:  # new heads leave the old ones' calibration
            return config.calibration
        if before is not None:
            return self.calibration_in(before)
        source = self.starts_from(stage)
        return self.calibration if source is not None and source.run is not None else None

    def stage_before(self, stage: str) -> str | None:
        """Return the stage of this run whose weights a stage begins with; None if it begins with others."""
        # Earlier ones only, so that following them comes to an end. The checks refuse any other reference.
        earlier = list(self.stages)[: list(self.stages).index(stage)]
        source = self.starts_from(stage)
        return source.stage if source is not None and source.stage in earlier else None

    def fits_head_first(self, stage: str) -> bool:
        """Return whether a stage with steps begins with fitting its head to the training images.

        It does so where it gives the experts a head that asks for it, not where it goes on with one. Of a saved run's
        model only the trainer knows whether it brings such a head (`StageTrainer.prepare`).
        """
        name, before = self.head_in(stage).name, self.stage_before(stage)
        begins = before is None or self.head_in(before).name != name or "heads" in self.stages[stage].reinit
        return bool(self.stages[stage].epochs) and piece("head", name).fits_first and begins

    def scores_trained_in(self, stage: str) -> str | None:
        """Return the last stage whose steps a stage's scores come from: of heads, or of what calibrates them.

        It is the stage itself or one before; None where the scores are a saved run's.
        """
        config = self.stages[stage]
        learns = {"heads"} | ({"calibration"} if self.calibration_in(stage) else set())
        if config.epochs and not learns.issubset(config.freeze):
            return stage
        before = self.stage_before(stage)
        return None if before is None else self.scores_trained_in(before)

    def gives_probabilities(self, stage: str) -> bool:
        """Return whether a softmax of a stage's scores is what they were trained for, as far as this run knows."""
        trained = self.stages.get(self.scores_trained_in(stage) or "")
        return trained is None or trained.objective is None or trained.objective.gives_probabilities

    @property
    def final(self) -> str:
        """The stage that trains the run's result: the last."""
        return list(self.stages)[-1]

    @property
    def finals(self) -> tuple[str, ...]:
        """Stages with a result of their own: no other begins with or learns from them, and they know all classes."""
        used = {source.stage for name in self.stages if (source := self.starts_from(name)) is not None}
        used |= {teacher.stage for stage in self.stages.values() for teacher in stage.teachers.values()}
        ends = [name for name, stage in self.stages.items() if name not in used and stage.classes is None]
        return tuple(name for name in self.stages if name in ends or name == self.final)

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


def stage_classes(method: Recipe, stage: str, counts: list[int]) -> list[int]:
    """Return the class ids that a stage knows, in the order of its logits."""
    subset = method.stages[stage].classes
    if subset is None:
        return list(range(len(counts)))
    groups = dict(zip(("many", "medium", "few"), split_classes(np.asarray(counts), 3, subset.rule), strict=True))
    return groups[subset.group].tolist()
