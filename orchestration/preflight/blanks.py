"""Stand-ins for what a plan neither opens nor computes: images, weights, and the results of convolutions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aggregation.aggregator import MeanLogits
from aggregation.serving import DESCRIPTION, ServedModel, TrainingData, blank_ensemble, describe, read_description
from experts.batches import TrainBatches
from experts.data.config import DatasetConfig
from experts.data.dataset import Dataset
from experts.data.images import ResidentImages
from experts.ensemble import build_ensemble
from experts.progress import Progress
from experts.registry import build
from orchestration.config.recipe import Teacher, stage_classes
from orchestration.config.run_config import RunConfig


def blank_dataset(config: DatasetConfig, counts_C: np.ndarray) -> Dataset:
    """Return a data set with the labels of a real one, whose images are single black pixels.

    Args:
        config: of the data set.
        counts_C: training images per class.
    """
    classes = np.arange(len(counts_C))
    return Dataset(
        config,
        class_names=tuple(map(str, classes)),
        counts_C=counts_C,
        train=_black(np.repeat(classes, counts_C), 1),
        val=_black(classes, 1),
        test=_black(classes, 1),
        digest="",
        raw_image_shape=None,
    )


def _black(labels: np.ndarray, size: int) -> ResidentImages:
    return ResidentImages(torch.zeros(len(labels), 3, size, size, dtype=torch.uint8), labels)


class _OneImage:
    """A sampler that draws the first image, again and again."""

    def __init__(self, draws: int) -> None:
        self.draws_per_epoch = draws

    def draw(self, progress: Progress, key: int) -> np.ndarray:
        """Return the epoch's positions, int64 [draws_per_epoch]."""
        del progress, key
        return np.zeros(self.draws_per_epoch, dtype=np.int64)


def blank_batches(stream: TrainBatches, label: int, images: int) -> TrainBatches:
    """Return a stage's stream with black images of one class in place of its own.

    Args:
        stream: with its augmentation, mixing and views.
        label: of every image.
        images: per replica and step.
    """
    in_all = images * stream.replica.count
    return TrainBatches(
        _black(np.array([label]), stream.dataset_config.image_size),
        _OneImage(in_all),
        stream.dataset_config,
        replace(stream.config, batch_size=in_all),
        stream.replica,
        stream.mixing,
        _OneImage(in_all) if stream.second_sampler is not None else None,
        stream.views,
    )


@dataclass(frozen=True)
class BlankTeacher:
    """A teacher with random weights in place of its own.

    Attributes:
        model: of the teacher's size.
        known: False where the model is a guess: its run is missing, or only the data can say its classes.
    """

    model: ServedModel
    known: bool

    @property
    def num_experts(self) -> int:
        return len(self.model.description.expert_names)

    @property
    def num_classes(self) -> int:
        return self.model.description.num_classes

    def fresh(self) -> ServedModel:
        """Return a copy to train with; a mesh changes the modules of a teacher."""
        return copy.deepcopy(self.model)


def blank_teachers(
    config: RunConfig, stage: str, counts_C: np.ndarray, *, counts_known: bool
) -> dict[str, BlankTeacher]:
    """Return stand-ins for a stage's teachers, by name.

    Args:
        config: of the run.
        stage: that learns from them.
        counts_C: training images per class.
        counts_known: False where the counts are assumed.
    """
    settings = config.method.stages[stage]
    own_counts_C = counts_C[stage_classes(config.method, stage, counts_C.tolist())]
    objective = build(
        "objective", settings.objective, torch.from_numpy(own_counts_C), len(config.method.names_in(stage))
    )
    expected: Mapping[str, np.ndarray] = objective.teacher_classes
    found = {}
    for name, source in settings.teachers.items():
        all_classes = len(expected.get(name, counts_C))
        teacher = _teacher(config, source, counts_C, counts_known=counts_known)
        if teacher is None or teacher.num_classes != all_classes:
            classes = expected.get(name, np.arange(len(counts_C)))
            teacher = BlankTeacher(_model(config, stage, counts_C, classes), known=False)
        found[name] = teacher
    return found


def _teacher(config: RunConfig, source: Teacher, counts_C: np.ndarray, *, counts_known: bool) -> BlankTeacher | None:
    """Return a stage or another run as a teacher; None for a run that is missing or cannot be read."""
    if source.stage is None:
        assert source.run is not None
        try:
            description = read_description(source.folder(config.run.dir) / source.export / DESCRIPTION)
        except ValueError:
            return None
        return BlankTeacher(ServedModel(blank_ensemble(description), description), known=True)
    classes = np.array(stage_classes(config.method, source.stage, counts_C.tolist()))
    known = counts_known or (
        config.method.stages[source.stage].classes is None and config.dataset.num_classes is not None
    )
    return BlankTeacher(_model(config, source.stage, counts_C, classes), known)


def _model(config: RunConfig, stage: str, counts_C: np.ndarray, classes: np.ndarray) -> ServedModel:
    """Return what a stage would export, with random weights."""
    ensemble = config.ensemble(stage, len(classes))
    data = TrainingData(
        dataset=config.dataset,
        class_names=[str(c) for c in classes],
        counts=counts_C[classes].tolist(),
        image_shape=None,
    )
    # The mean works for any ensemble; the rule itself may need gates, or other classes than a guess has.
    description = describe(ensemble, MeanLogits.Config(), data)
    return ServedModel(build_ensemble(ensemble, seed=config.seed), description)


class NoArithmetic(TorchFunctionMode):
    """While open, initial weights are one small number, and convolutions give zeros of the right shape and type.

    A rehearsed step asks what crosses between workers and which parts run, and reads no result. Convolutions and random
    numbers are nine tenths of its time, so that with them a plan for a ResNet-152 would take a minute.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        if func is torch.conv2d:
            return _conv2d(*args, **(kwargs or {}))
        if getattr(func, "__module__", None) == "torch.nn.init" and func.__name__ in _RANDOM:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).fill_(0.01)
        return func(*args, **(kwargs or {}))


_RANDOM = (
    "kaiming_normal_", "kaiming_uniform_", "normal_", "orthogonal_", "trunc_normal_", "uniform_", "xavier_normal_",
    "xavier_uniform_",
)  # fmt: skip


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    shape = torch.conv2d(x.to("meta"), weight.to("meta"), None, *args, **kwargs).shape
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _Zeros.apply(shape, dtype, x, weight, *([] if bias is None else [bias]))


class _Zeros(torch.autograd.Function):
    """Zeros with a gradient of zero for each of some tensors."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(t.new_zeros(()).expand_as(t) for t in ctx.saved_tensors)
