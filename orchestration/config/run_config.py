"""The schema of a run: every key of the command line, validated once.

Keys under `cluster`, `tracking` and most of `run` say where and how a run is carried out; they may change between a
start and a resume. All other keys are the run's identity (identity.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from experts.data.config import DatasetConfig
from experts.ensemble import EnsembleConfig
from experts.registry import PieceOf, Settings, build, piece
from orchestration.config.method import MethodConfig
from orchestration.config.recipe_checks import parts_that_learn


class EngineConfig(Settings):
    """How a training step is computed."""

    name: Literal["auto", "deepspeed", "torch"] = "auto"
    """'torch' is plain PyTorch, 'deepspeed' ZeRO; both compute the same. 'auto' is ZeRO where several workers can share
    its partitions, and plain PyTorch for one worker."""
    zero_stage: Literal[1, 2] = 1
    precision: Literal["float32", "tf32", "float64", "autocast"] = "float32"
    """'tf32' lets a GPU round the inputs of convolutions to 10 binary digits; 'float32' does not. 'autocast' computes
    the network in bfloat16 and keeps weights in float32."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads per worker. They change results in the last bits, so the number of the first start is stored in the
    run's config.yaml. Unset: as many as a worker has whole CPUs, at least 1."""
    deterministic: bool = False
    """Have a GPU compute the same bits from the same numbers, in kernels that take longer, so that a run which was
    killed and resumed ends bitwise equal. A CPU does so anyway."""
    sync_batchnorm: bool = True
    """Use statistics of the global batch where an expert's batch is split over several workers."""
    compile: bool = False
    """Have torch compile trunk and experts on every worker, which takes minutes at the first start and needs a C++
    compiler there. Changes results in the last bits."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Place of images and convolutions' weights in memory: the channels of a pixel side by side (channels_last) or
    each channel by itself (contiguous). 'auto' is the faster one of the two for device and precision. Changes results
    in the last bits."""
    graphs: Literal["auto", False] = "auto"
    """'auto' records the kernels of a step on a GPU once and replays them, where the recipe's pieces allow it; false
    launches them one by one. The kernels and their results are the same."""

    @property
    def differences(self) -> list[str]:
        """Say how the run computes otherwise than by default, as far as it changes bits."""
        precision = [self.precision] if self.precision != "float32" else []
        memory = [self.memory_format.replace("_", " ")] if self.memory_format != "auto" else []
        return precision + ["deterministic"] * self.deterministic + ["compiled"] * self.compile + memory

    def chosen(self, workers: int) -> Literal["deepspeed", "torch"]:
        """Return the engine for a mesh of so many workers."""
        if self.name == "auto":
            return "torch" if workers == 1 else "deepspeed"
        return self.name


def _number_or_auto(value: Any) -> Any:
    """Refuse what is neither a positive whole number nor 'auto', in one message for both."""
    if value is None or value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("needed a whole number of 1 or more, or auto")


def _seconds_or_auto(value: Any) -> Any:
    """Refuse what is neither a positive number nor 'auto', in one message for both."""
    if value == "auto" or (type(value) in (int, float) and value > 0):
        return value
    raise ValueError("needed a number of seconds above 0, or auto")


class ClusterConfig(Settings):
    """Where a run is carried out. Never changes its results beyond rounding."""

    address: str | None = None
    """Ray's address; 'auto' for the cluster of this machine. Unset: RAY_ADDRESS, else its own Ray."""
    workers: Annotated[int, Field(ge=1)] = 1
    experts_per_worker: Annotated[int | Literal["auto"] | None, BeforeValidator(_number_or_auto)] = None
    """Unset: 1 worker holds all experts (packed); with a multiple of the number of experts, each holds one (spread).
    'auto': what `expertail plan` finds fastest for these workers when a run first starts; the run keeps that number."""
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = None
    """CPUs of a worker, which may be a fraction. Unset: the cluster's CPUs divided by the workers."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """0 computes on the CPU with gloo, 1 on one GPU with NCCL."""
    placement_timeout_s: Annotated[float | Literal["auto"], BeforeValidator(_seconds_or_auto)] = "auto"
    """Seconds that a start waits for places that others hold. 'auto': 24 hours in a submitted job, 8 s anywhere else.
    Once it trains, a run holds places itself and waits less long ('auto' is 8 s): stages side by side this long for
    theirs, a restart or move ten times this long for a node. What the cluster could never hold is refused at once."""
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A worker that finishes no step, image batch or file for this many seconds counts as hanging."""
    side_by_side: Annotated[int, Field(ge=1)] | None = None
    """The most stages that may train at once, each on its own workers. Unset: as many stages that train a trunk as the
    recipe allows and the cluster has room for; stages that train heads alone go one after the other."""
    max_failures: Annotated[int, Field(ge=0)] = 5
    """Restarts after a worker died, in a row without a new checkpoint of the stage, before the run gives up."""
    max_preemptions: Annotated[int, Field(ge=0)] = 100
    """How often nodes may be taken away during one start before the command ends with exit code 75."""
    standby: Annotated[int, Field(ge=0, le=8)] = 0
    """Spare worker processes with libraries loaded and data opened, so that a dead worker is replaced in seconds. Each
    holds about as much memory as a worker before training. CPU only."""
    memory_gib_per_worker: Annotated[float, Field(gt=0)] | None = None
    """Memory of a worker's process, GiB: requested from Ray for its placement, and a limit above which the run ends
    with a message. Unset: no limit."""

    @property
    def named_address(self) -> str | None:
        """Address of the cluster that the config, or else RAY_ADDRESS, names; None for our own Ray on this machine."""
        return self.address or os.environ.get("RAY_ADDRESS") or None

    @model_validator(mode="after")
    def _spares_on_cpu(self) -> ClusterConfig:
        if self.standby and self.gpus_per_worker:
            raise ValueError(
                f"standby = {self.standby} with gpus_per_worker = {self.gpus_per_worker}: spare processes are kept for "
                f"CPU workers only; set standby=0"
            )
        return self


class RunSettings(Settings):
    """The run folder, and what is written to it and when."""

    name: str | None = None
    """Folder below run.dir. Unset: method-dataset-seed."""
    dir: str = "runs"
    """A folder that all nodes share, or a URL that fsspec can open, e.g. s3://bucket/runs."""
    local_dir: str = "~/.cache/expertail/runs"
    """The driver's working folder if run.dir is a URL."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimiser steps, counted over all stages; evaluate and exit 0."""
    evaluate_every_epochs: Annotated[int, Field(ge=1)] = 1
    """The 'best' model is chosen among the evaluated epochs. The last epoch is always evaluated."""
    evaluation_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Images scored at once. auto: 256 on a CPU; on other devices as many as have 2^22 pixels together, rounded down to
    a power of two (4096 images of 32 x 32, 64 of 224 x 224), but at least 1. Never by free memory, since the last bits
    of scores may depend on it. Set a number where a device has no room for so many."""
    select_on: Literal["auto", "val", "test"] = "auto"
    """The split that chooses the 'best' model. auto: val if there is one, else test; every table names it."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 500
    """In addition to one at the end of every evaluated epoch."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    predictions: bool = True
    """Keep what ensemble and experts say of every image of test and val, for the last and the best weights of final
    stages (evaluation/predictions-*.npz), and measure more of it. Costs one or two passes over these images at the end.
    """
    predictions_mib: Annotated[int, Field(ge=0)] = 1024
    """Memory of the driver for the scores of a split, twice the size of their file. Where they need more, files leave
    the scores of all classes out, and keep class, rank and confidence of every image."""
    pictures: bool = True
    """Draw report/*.png at the end, which takes some seconds. report/table.txt is always written."""
    features_picture: Literal["pca", "tsne", False] = "pca"
    """Projection of features of test images onto a plane, before and after each stage: principal components, or t-SNE,
    which needs scikit-learn. false draws neither them nor the lengths of features and weights."""
    features_classes: tuple[int | str, ...] | None = None
    """Ids or names of the classes on that plane. Unset: ten at most, from frequent to rare in each group."""
    log_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between plain progress lines."""


class TrackingConfig(Settings):
    """MLflow. The run folder is the original; MLflow has a copy."""

    enabled: bool = True
    uri: str | None = None
    """Tracking server or store. Unset: a SQLite file in run.dir."""
    experiment: str = "expertail"
    final_wait_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that the end of a run may wait for the upload to finish."""
    log_model: bool = True
    """Upload the trained ensembles, last and best, as MLflow models."""


class RunConfig(Settings):
    """The whole config of a run."""

    seed: Annotated[int, Field(ge=0)] = 0
    method: MethodConfig
    dataset: DatasetConfig
    backbone: Annotated[Any, PieceOf("model")]
    engine: EngineConfig = Field(default_factory=EngineConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    run: RunSettings = Field(default_factory=RunSettings)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    def evaluation_batch_size(self, device_type: str) -> int:
        """Return the number of images to score at once on a device of this type, e.g. "cuda"."""
        if self.run.evaluation_batch_size != "auto":
            return self.run.evaluation_batch_size
        if device_type == "cpu":
            return 256
        images = max(1, 2**22 // self.dataset.image_size**2)
        return 2 ** (images.bit_length() - 1)

    @model_validator(mode="after")
    def _data_fits(self) -> RunConfig:
        problems = [*name_problems(self), *data_problems(self), *view_problems(self), *precision_problems(self)]
        problems += [*attention_problems(self), *sibling_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def resume(self) -> Literal["bitwise", "to rounding"]:
        """Say how exactly a run that was killed and resumed ends as one that was not."""
        return "to rounding" if self.cluster.gpus_per_worker and not self.engine.deterministic else "bitwise"

    @property
    def side_by_side(self) -> int:
        """The most stages that train at once if the cluster has room."""
        asked, method = self.cluster.side_by_side, self.method
        # Stages that train heads alone are short: places for them would be taken from the long stage before them.
        counted = {s for s in method.stages if asked or "trunk" in parts_that_learn(method, s)}
        widest = max(1, *(len(counted.intersection(wave)) for wave in method.waves()))
        return min(widest, asked or widest)

    def ensemble(self, stage: str, num_classes: int) -> EnsembleConfig:
        """Return what a stage's ensemble is made of, by the run's backbone and method."""
        return EnsembleConfig(
            self.backbone,
            self.method.head_in(stage),
            num_classes=num_classes,
            expert_names=self.method.names_in(stage),
            reduce_dimension=self.method.reduce_dimension,
            shared_head=self.method.shared_head,
            router=self.method.router,
            calibration=self.method.calibration_in(stage),
            attention=self.method.attention,
            image_size=self.dataset.image_size,
        )

    @property
    def run_name(self) -> str:
        return self.run.name or f"{self.method.name}-{self.dataset.name}-s{self.seed}"


_LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255


def name_problems(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each name that cannot name a file or folder, or would put it elsewhere."""
    name = config.run_name
    fits = name.isprintable() and len(name.encode()) <= _LONGEST_NAME  # printable text can always be encoded
    if not fits or name.startswith(".") or set("/\\") & set(name):
        origin = "" if config.run.name else " (made of method.name, dataset.name and seed)"
        yield (
            f"run.name = {name!r}{origin}: needed the name of one folder, of at most {_LONGEST_NAME} bytes, "
            f"without / and not beginning with a dot; where that folder lies is run.dir"
        )
    for stage in config.method.stages:
        if not re.fullmatch(r"[\w-]+", stage):
            yield f"method.stages: {stage!r} is no name of a stage; needed letters, digits, _ and - only"
        if stage in ("last", "best"):
            yield f"method.stages: {stage!r} is no name of a stage, but of the run's models; choose another"


def attention_problems(config: RunConfig) -> Iterator[str]:
    """Yield a problem if experts are to have attention on maps that they do not have."""
    if config.method.attention is not None and not build("model", config.backbone).experts_have_maps:
        yield (
            f"method.attention.name = {config.method.attention.name}: found backbone.split = {config.backbone.split}, "
            f"whose experts have no last map of their own; needed another split, or method.attention=null"
        )


def sibling_problems(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each sibling of a run whose run.dir is a URL: models are read from disk."""
    if "://" in config.run.dir:
        for name, stage in config.method.stages.items():
            for source in stage.sources:
                if source.sibling is not None:
                    yield (
                        f"method.stages.{name}: run = {source.run}: run.dir is the URL {config.run.dir}, and models "
                        f"are read from disk; needed the path of a copy of that run"
                    )


def precision_problems(config: RunConfig) -> Iterator[str]:
    """Yield a problem if the precision is one that the workers' devices do not have."""
    if config.engine.precision == "tf32" and not config.cluster.gpus_per_worker:
        yield (
            "engine.precision = tf32: found cluster.gpus_per_worker = 0, and a CPU has no TF32; set "
            "engine.precision=float32 or cluster.gpus_per_worker=1"
        )


def view_problems(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each stage whose views would be the same pixels, or lack what an auxiliary guesses."""
    for name, stage in config.method.stages.items():
        first = stage.augment or config.dataset.augment
        for key, auxiliary in stage.auxiliaries.items():
            wanted, found = piece("auxiliary", auxiliary.name).guesses, [config.name for config in first.stack]
            if wanted is not None and wanted not in found:
                yield (
                    f"method.stages.{name}.auxiliaries.{key}: auxiliary '{auxiliary.name}' guesses what augmentation "
                    f"'{wanted}' has drawn for an image; found {', '.join(found) or 'no augmentation'}; set "
                    f"method.stages.{name}.augment to a stack with {wanted}, as augment.name=rotated"
                )
        alike = [augment for augment in (stage.augment or config.dataset.augment, *stage.views) if augment.is_off]
        if stage.views and len(alike) > 1:
            yield (
                f"method.stages.{name}.views: {len(alike)} of them change nothing at random, so that they would show "
                f"the same; needed dataset.augment, the stage's augment or other views"
            )


def data_problems(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each stage that needs other data, as far as the config tells."""
    data = config.dataset
    if data.val_per_class or data.val_list or data.source == "image_folder":  # a folder may have val/ beside test/
        return
    for name, stage in config.method.stages.items():
        if stage.objective is not None and stage.objective.observes:
            yield (
                f"dataset.val_per_class = 0: objective '{stage.objective.name}' of stage {name} needs a validation "
                f"split, and never takes the test set; set dataset.val_per_class (cut from the training pool) or, for "
                f"source=image_list, dataset.val_list"
            )
