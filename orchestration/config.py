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
from experts.data.config import DatasetConfig
from experts.registry import Settings, choice, import_pieces

import_pieces(experts, aggregation)


class PieceOf:
    """Marks a field that holds the config of any registered piece of one kind, told apart by its `name`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(choice(self.kind))


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
    stages: Annotated[dict[str, StageConfig], Field(min_length=1)]
    expected: Expected | None = None
    """What was published for this recipe on this data; for the report only."""

    @model_validator(mode="after")
    def _pieces_fit(self) -> MethodConfig:
        problems = []
        for name, stage in self.stages.items():
            try:
                stage.objective.check_head(self.head)
            except ValueError as problem:
                problems.append(f"stages.{name}.{problem}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(f"expert{i}" for i in range(self.num_experts))


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
    max_failures: Annotated[int, Field(ge=0)] = 5
    """Restarts after a worker died before the run gives up."""


class RunSettings(Settings):
    """The run folder and what is written to it when."""

    name: str | None = None
    """Folder below run.dir. Unset: method-dataset-seed."""
    dir: str = "runs"
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
