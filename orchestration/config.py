"""The schema of a run: everything a command can say, checked once, every problem in one message.

`RunConfig` is what a run means. Keys under `cluster`, `tracking` and most of `run` say where and how it is carried
out; they may change between a start and a resume. All others are the run's identity (`identity`).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema

import aggregation
import experts
from experts.class_groups import GroupRule
from experts.data.config import DatasetConfig
from experts.flow import Plain
from experts.registry import Settings, choice, import_pieces
from orchestration.recipe_checks import data_problems, name_problems, recipe_problems

import_pieces(experts, aggregation)


class PieceOf:
    """Marks a field that holds the config of any registered piece of one kind, told apart by its `name`."""

    def __init__(self, kind: str, *, optional: bool = False) -> None:
        self.kind = kind
        self.optional = optional

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        chosen = choice(self.kind)
        return handler.generate_schema(chosen | None if self.optional else chosen)


class OptimizerConfig(Settings):
    """SGD, as every method of the field uses it."""

    lr: Annotated[float, Field(gt=0)]
    """Base learning rate; the stage's lr_schedule multiplies it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty on every trainable parameter, BatchNorm's included, as published."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum > 0; set momentum, or nesterov = false")
        return self


class Source(Settings):
    """A trained ensemble: of a stage of this run, or of another run."""

    stage: str | None = None
    """A stage of this run that comes earlier."""
    run: str | None = None
    """Folder of a finished run."""
    weights: Literal["last", "best"] = "last"
    """Which of its models."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Source:
        if (self.stage is None) == (self.run is None):
            raise ValueError(
                f"stage = {self.stage}, run = {self.run}: needed exactly one of them: stage (an earlier one of this "
                f"run) or run (the folder of another)"
            )
        return self


class Teacher(Source):
    """A frozen ensemble whose scores a stage learns from."""

    mode: Literal["eval", "train"] = "eval"
    """"train" normalises with the statistics of each batch, as RIDE's published code does by oversight."""


class ClassSubset(Settings):
    """Some of the classes, and nothing of the others: a stage's data and label space."""

    group: Literal["many", "medium", "few"]
    rule: GroupRule = GroupRule()
    """What makes the three groups."""


class Mixup(Settings):
    """Blends every training image with another of its batch; the loss is blended likewise.

    Source: Zhang et al. 2018, arXiv:1710.09412.
    """

    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of the Beta(alpha, alpha) that the share of the first image is drawn from, once a batch."""


Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LrFactors(Settings):
    """What the learning rate of each part of the ensemble is multiplied with, no unit. Objectives may have factors for
    each expert besides; the two are multiplied."""

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
    """Leave out the partial last batch of an epoch. Published CIFAR code keeps it."""
    flow: Annotated[Any, PieceOf("flow")] = Plain.Config()
    """How images become outputs."""
    partner_sampler: Annotated[Any, PieceOf("sampler", optional=True)] = None
    """Of a second batch, paired with the first by row, for flows that need one (bilateral, h2t)."""
    mixup: Mixup | None = None
    freeze: tuple[Literal["trunk", "features", "heads"], ...] = ()
    """What does not learn in this stage."""
    lr_factors: LrFactors = LrFactors()
    """Published for Places-LT from pretrained weights: trunk and features at a tenth of the heads' rate."""
    frozen_batchnorm: Literal["eval", "train"] = "eval"
    """BatchNorm of what is frozen: "eval" uses its running statistics; "train" those of the batch, and moves them."""
    teachers: dict[str, Teacher] = Field(default_factory=dict)
    """By name; objectives and distillations that learn from them say which names they know."""
    distillation: Annotated[Any, PieceOf("distillation", optional=True)] = None
    after: tuple[str, ...] | None = None
    """Stages that must have ended before. Unset: the one before in the recipe. Stages that wait for none of each other
    run side by side where the cluster has places, each on workers of its own."""
    start_from: Source | None = None
    """Weights to begin with. Unset: those of the stage before in the recipe, if `after` is unset, else new ones."""
    classes: ClassSubset | None = None
    """Unset: all."""
    aggregator: Annotated[Any, PieceOf("aggregator", optional=True)] = None
    """How the experts are combined once this stage has begun. Unset: the method's rule."""
    experts: tuple[str, ...] | None = None
    """Names of this stage's experts where they are not the method's: another ensemble, of the same make."""


class Expected(Settings):
    """A published result, and what it holds for. Shown beside a run only where the run meets every condition."""

    top1: dict[str, float]
    """Percent, by group."""
    remark: str
    """What made the number: source, epoch chosen on which split, what the recipe here lacks."""
    conditions: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the config and the values they must have."""


class MethodConfig(Settings):
    """A recipe: experts, their stages in order, how they are combined at test time."""

    name: str
    num_experts: Annotated[int, Field(ge=1, le=8)]
    reduce_dimension: bool = False
    """RIDE's thinner late stages (24 and 48 channels in place of 32 and 64)."""
    head: Annotated[Any, PieceOf("head")]
    aggregator: Annotated[Any, PieceOf("aggregator")]
    experts: tuple[str, ...] | None = None
    """Names of the experts, in the order of the logits. Unset: expert0, expert1, ..."""
    shared_head: bool = False
    """One head for all experts, as ResLT has it."""
    router: Annotated[Any, PieceOf("router", optional=True)] = None
    """Decides per image how many experts to ask, once a stage has trained it."""
    backbone_weights: str | None = None
    """Pretrained weights, written by `expertail import-weights`, that new networks begin with. Unset: random ones."""
    stages: Annotated[dict[str, StageConfig], Field(min_length=1)]
    expected: Expected | None = None
    """What was published for this recipe on this data; for the report only."""

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
        """Names of the experts that a stage trains."""
        return self.stages[stage].experts or self.expert_names

    def aggregator_in(self, stage: str) -> Any:
        """The rule that combines a stage's experts."""
        return self.stages[stage].aggregator or self.aggregator

    @property
    def final(self) -> str:
        """The stage that makes what the run is for."""
        return list(self.stages)[-1]

    def waits_for(self, stage: str) -> tuple[str, ...]:
        """Stages that must have ended before a stage begins."""
        names = list(self.stages)
        place = names.index(stage)
        after = self.stages[stage].after
        return tuple(names[place - 1 : place]) if after is None else after

    def starts_from(self, stage: str) -> Source | None:
        """The weights that a stage begins with; None for new ones."""
        config = self.stages[stage]
        before = self.waits_for(stage)
        if config.start_from is None and config.after is None and before:
            return Source(stage=before[0])
        return config.start_from

    def waves(self) -> list[list[str]]:
        """Stages that may run side by side, wave after wave."""
        waves: list[list[str]] = []
        done: set[str] = set()
        while len(done) < len(self.stages):
            waves.append([s for s in self.stages if s not in done and done.issuperset(self.waits_for(s))])
            done.update(waves[-1])
        return waves


class EngineConfig(Settings):
    """What carries out a step."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    """'torch' is the control run that tests compare DeepSpeed with."""
    zero_stage: Literal[1, 2] = 1
    precision: Literal["float32", "float64", "autocast"] = "float32"
    """'autocast' computes the network in bfloat16 and keeps weights in float32."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads per worker. Changes results in the last bits, so the number found at the first start is kept in the
    run's config.yaml. Unset: the whole CPUs of a worker, at least 1."""
    sync_batchnorm: bool = True
    """BatchNorm over the global batch when one expert's batch is split over several workers."""


class ClusterConfig(Settings):
    """Where a run lives. Never changes what it computes beyond rounding."""

    address: str | None = None
    """Ray's address; 'auto' for the cluster this machine belongs to. Unset: RAY_ADDRESS, else a Ray of its own."""
    workers: Annotated[int, Field(ge=1)] = 1
    experts_per_worker: Annotated[int, Field(ge=1)] | None = None
    """Unset: 1 worker holds all experts (packed); a multiple of the number of experts holds one each (spread)."""
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = None
    """Share of CPUs, may be a fraction. Unset: the cluster's CPUs divided by the workers."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """0 computes on CPU with gloo, 1 on one GPU with NCCL."""
    placement_timeout_s: Annotated[float, Field(gt=0)] = 8.0
    """How long to wait for resources that exist but are taken."""
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A worker that finishes no step, image batch or file for this long is taken to hang."""
    side_by_side: Annotated[int, Field(ge=1)] | None = None
    """Stages that may train at once, each on workers of its own. Unset: as many as the recipe has and the cluster has
    places for."""
    max_failures: Annotated[int, Field(ge=0)] = 5
    """Restarts in a row after a worker died, without a new checkpoint of the stage between, before the run gives up."""
    max_preemptions: Annotated[int, Field(ge=0)] = 100
    """Times that nodes may be taken away from one start of the command before it ends with exit status 75."""
    standby: Annotated[int, Field(ge=0, le=8)] = 0
    """Spare worker processes kept warm, libraries loaded and data opened, so that a dead worker is replaced in seconds.
    Each holds about as much memory as a worker before training. CPU only."""
    memory_gib_per_worker: Annotated[float, Field(gt=0)] | None = None
    """Memory of a worker's process, GiB: asked of Ray when workers are placed, and a limit above which the run ends
    with a message. Unset: whatever there is."""

    @model_validator(mode="after")
    def _spares_on_cpu(self) -> ClusterConfig:
        if self.standby and self.gpus_per_worker:
            raise ValueError(
                f"standby = {self.standby} with gpus_per_worker = {self.gpus_per_worker}: spare processes are kept for "
                f"CPU workers only; set standby=0"
            )
        return self


class RunSettings(Settings):
    """The run folder and what is written to it when."""

    name: str | None = None
    """Folder below run.dir. Unset: method-dataset-seed."""
    dir: str = "runs"
    """A folder that all nodes share, or a URL that fsspec opens, as s3://bucket/runs."""
    local_dir: str = "~/.cache/expertail/runs"
    """Where the driver works while run.dir is a URL."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimiser steps of the last stage reached, evaluate, exit 0."""
    evaluate_every_epochs: Annotated[int, Field(ge=1)] = 1
    """Every evaluation is a chance to be 'best'. The last epoch is always evaluated."""
    evaluation_batch_size: Annotated[int, Field(ge=1)] = 256
    select_on: Literal["auto", "val", "test"] = "auto"
    """The split that chooses 'best'. auto: val where there is one, else test, named as such in every table."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 500
    """Besides one at the end of every evaluated epoch."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    pictures: bool = True
    """Draw report/*.png at the end; some seconds a run. report/table.txt is written in any case."""
    log_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between plain progress lines."""


class TrackingConfig(Settings):
    """MLflow. The run folder is the truth; this is its mirror."""

    enabled: bool = True
    uri: str | None = None
    """Tracking server or store. Unset: a SQLite file in run.dir."""
    experiment: str = "expertail"
    final_wait_s: Annotated[float, Field(ge=0)] = 60.0
    """How long the end of a run may wait for the upload to finish."""
    log_model: bool = True
    """Upload the trained ensembles, last and best, as MLflow models."""


class RunConfig(Settings):
    """Everything one run is made of."""

    seed: Annotated[int, Field(ge=0)] = 0
    method: MethodConfig
    dataset: DatasetConfig
    backbone: Annotated[Any, PieceOf("model")]
    engine: EngineConfig = Field(default_factory=EngineConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    run: RunSettings = Field(default_factory=RunSettings)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _data_fits(self) -> RunConfig:
        problems = [*name_problems(self), *data_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def side_by_side(self) -> int:
        """The most stages that train at once, where the cluster has places."""
        widest = max(map(len, self.method.waves()))
        return min(widest, self.cluster.side_by_side or widest)

    @property
    def run_name(self) -> str:
        return self.run.name or f"{self.method.name}-{self.dataset.name}-s{self.seed}"


MAY_CHANGE = (
    "cluster",
    "tracking",
    "run",
    "method.expected",
    "dataset.root",
    "dataset.train_list",
    "dataset.val_list",
    "dataset.test_list",
    "dataset.download",
    "dataset.loader_processes",
)
"""What a resume may say differently; `run.evaluate_every_epochs` and `run.select_on` may not (`identity`). Other data
under a moved root or list is found by its digest."""


def identity(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides the numbers, as one flat mapping of dotted keys."""
    flat = flatten(config.model_dump(mode="json"))
    kept = {key: value for key, value in flat.items() if not _covered(key, MAY_CHANGE)}
    for key in ("run.evaluate_every_epochs", "run.select_on"):
        kept[key] = flat[key]
    return kept


def config_hash(config: RunConfig) -> str:
    """Twelve hexadecimal digits that name the identity of a run."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines 'key: old -> new' for every key in which two identities differ."""
    absent = object()
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, absent), new.get(key, absent)
        if a != b:
            lines.append(f"{key}: {'(unset)' if a is absent else a} -> {'(unset)' if b is absent else b}")
    return lines


def published(config: RunConfig) -> str | None:
    """One line with the published result, or None where there is none for exactly this config."""
    expected = config.method.expected
    if expected is None:
        return None
    flat = flatten(config.model_dump(mode="json"))
    if any(flat.get(key) != value for key, value in expected.conditions.items()):
        return None
    numbers = ", ".join(f"{group} {value:g}" for group, value in expected.top1.items())
    return f"published, top-1 in %: {numbers} ({expected.remark})"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys for a nested mapping; lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _covered(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(root + ".") for root in roots)
