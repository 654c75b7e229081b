"""Rehearse a stage's step in this process, and record what a worker would hold, compute and exchange.

The step is the one that trains: `TrainingSetup` and `TrainingStep`, for one worker of each slot, with black images in
place of the data and random weights in place of the teachers'. Its mesh exists on paper only (exchange.py): whatever
crosses a group there is written down. So a plan covers every recipe, and cannot miss an exchange.

    teachers = stand-ins of their size                                 blanks.py
    for each slot:
        setup = TrainingSetup(config, labels without images, mesh on paper, teachers)
        hook trunk, features, heads and gates                          `_Work`: images that pass, forward and back
        for 2 images, then 3:
            TrainingStep(setup)(black images of the rarest class)      each exchange in the record, with its bytes;
                                                                       `_Calls` counts calls of torch
                                                                       (features, where training keeps them)
        bytes per image = the difference; the rest does not grow

The images are at most 32 pixels wide: exchanges do not depend on their size, and work is counted in images and
multiplied by the cost of each part at the run's size (`costs_of`). ZeRO exchanges inside DeepSpeed, which is not
started: `_ZeroOnPaper` computes its exchanges from the parameters that learn.

Shapes: E experts, e in one slot, B images, C classes, D features.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from experts.auxiliaries.attached import auxiliaries_of
from experts.backbones.cost import multiply_adds, multiply_adds_by_shape
from experts.batches import Batch, Mixed, TrainBatches
from experts.ensemble import TRAINING_ONLY, Ensemble, build_ensemble, part_of
from orchestration.config.run_config import RunConfig
from orchestration.preflight.blanks import BlankTeacher, NoArithmetic, blank_batches, blank_dataset
from orchestration.training.engine import IN_WORDS, TorchEngine, check, group_of
from orchestration.training.exchange import Crossing, Kind, record_groups
from orchestration.training.features import features_are_kept
from orchestration.training.leaves import PARTS, Leaves, number_of
from orchestration.training.mesh import Mesh, MeshShape
from orchestration.training.stage_setup import TrainingSetup
from orchestration.training.step import TrainingStep

_FEW, _MORE = 2, 3  # images; BatchNorm cannot train on one value
_LARGEST = 32  # pixels


@dataclass(frozen=True)
class Costs:
    """Multiply-adds per image in a forward pass of the trunk, of one expert's late stages, of a head and of a gate.

    Attributes:
        width: number of features of an expert, D.
    """

    trunk: int
    features: int
    head: int
    gate: int
    width: int


@dataclass(frozen=True)
class Traffic:
    """A worker's contribution to the exchanges of one name in a step.

    Attributes:
        what, kind, among: as of `Crossing`.
        fixed: bytes that do not depend on the number of images.
        per_image: bytes for each image of the worker's replica.
        times: how often it is made in one step.
    """

    what: str
    kind: Kind
    among: int
    fixed: int
    per_image: int
    times: int


@dataclass
class Load:
    """The load of one step on a worker of one slot.

    Attributes:
        parameters: numbers held, by "trunk", "shared" and expert.
        teacher_parameters: numbers held of teachers.
        learning: numbers that learn, by "trunk", "experts" and "shared", one entry per learning rate.
        traffic: what the worker exchanges.
        trunk_work: multiply-adds per image in forward passes of trunks, by "" for the ensemble's and by teacher.
        work: the same of everything, teachers included. An image and its partner count as one.
        training_work: the same with backward passes.
        work_before: multiply-adds per training image before the first step, where features are computed once.
        work_each_epoch: multiply-adds per training image before an epoch, where auxiliaries look at all images.
        auxiliary_bytes: of what auxiliaries and copies of the network hold beside the ensemble, memories too.
        calls: functions of torch that a step calls. One that is differentiated counts twice, for it runs backward too.
    """

    parameters: dict[str, int]
    teacher_parameters: int
    learning: dict[str, list[int]]
    traffic: tuple[Traffic, ...] = ()
    trunk_work: dict[str, float] = field(default_factory=dict)
    work: float = 0.0
    training_work: float = 0.0
    work_before: float = 0.0
    work_each_epoch: float = 0.0
    auxiliary_bytes: int = 0
    calls: int = 0


def rehearse(
    config: RunConfig,
    stage: str,
    counts_C: np.ndarray,
    shape: MeshShape,
    teachers: Mapping[str, BlankTeacher],
    *,
    counts_known: bool = True,
    slots: range | None = None,
) -> tuple[list[Load], Costs]:
    """Rehearse a step of a stage for a worker of each slot.

    Args:
        config: validated.
        stage: name of the stage, which has steps.
        counts_C: training images per class, of all classes.
        shape: of the mesh.
        teachers: stand-ins, by name.
        counts_known: False where the counts are assumed; whether features of all images can be kept is open then, and
            the load is that of a stage that cannot.
        slots: those to rehearse, from 0 on; all by default.

    Returns:
        The load of each of these slots, and the costs of the ensemble's parts.

    Raises:
        ValueError: a piece refuses the classes, the number of experts or a teacher.
    """
    size = config.dataset.image_size
    costs = {name: costs_of(teacher.model.ensemble, size) for name, teacher in teachers.items()}
    loads = []
    for slot in slots or range(shape.slots):
        record: list[Crossing] = []
        setup = _setup(config, stage, counts_C, shape, slot, teachers, record)
        if slot == 0:  # whose first expert has a gate, if there are any
            costs[""] = costs_of(setup.model, size)
        kept = counts_known and features_are_kept(setup, costs[""].width)
        loads.append(_load(setup, record, costs, kept=kept))
        setup.close()
    return loads, costs[""]


def _setup(
    config: RunConfig,
    stage: str,
    counts_C: np.ndarray,
    shape: MeshShape,
    slot: int,
    teachers: Mapping[str, BlankTeacher],
    record: list[Crossing],
) -> TrainingSetup:
    """Return what the first worker of a slot would build, on a mesh that writes to the record."""
    rank = slot * shape.replicas
    mesh = Mesh(shape, rank, groups=record_groups(shape.slots, shape.replicas, rank, record))
    small = _small(config, stage)
    models = {name: teacher.fresh() for name, teacher in teachers.items()}
    engine = _EngineOnPaper if config.engine.chosen(shape.workers) == "torch" else _ZeroOnPaper
    with NoArithmetic():
        setup = TrainingSetup(small, stage, blank_dataset(small.dataset, counts_C), mesh, models, engine)
    setup.objective.assume_prepared()  # what it would take from the data does not change sizes
    return setup


def _load(setup: TrainingSetup, record: list[Crossing], costs: Mapping[str, Costs], *, kept: bool) -> Load:
    """Take the steps, and return their load. With `kept`, on features that were computed before the first."""
    load = Load(
        parameters=_parameters(setup.model),
        teacher_parameters=sum(p.numel() for held in setup.teachers.held.values() for p in held.parameters()),
        learning=_learning(setup.leaves),
        auxiliary_bytes=_auxiliary_bytes(setup.model),
    )
    own = costs[""]
    if any(piece.looks(setup.progress(0)) for piece in setup.auxiliaries.pieces):
        load.work_each_epoch = own.trunk + len(setup.model.experts) * own.features
    with _Work(load, [("", setup.model), *setup.teachers.held.items()], costs):
        few, load.calls = _step(setup, record, _FEW, own.width if kept else None)
    if kept:
        load.work_before = own.trunk + len(setup.model.experts) * own.features
    if setup.mesh.shape.workers > 1:
        more, _ = _step(setup, record, _MORE, own.width if kept else None)
        load.traffic = tuple(_traffic(few, more))
    return load


def _small(config: RunConfig, stage: str) -> RunConfig:
    """Return the config of the rehearsal: small images, no weights from files, counts that may be assumed."""
    size = min(config.dataset.image_size, _LARGEST)
    # Assumed counts may not fill a batch. Where counts are known, `epoch_of` has refused an epoch without one.
    settings = config.method.stages[stage].model_copy(update={"drop_last": False})
    stages = {**config.method.stages, stage: settings}
    method = config.method.model_copy(update={"backbone_weights": None, "stages": stages})
    dataset = config.dataset.model_copy(update={"image_size": size})
    return config.model_copy(update={"method": method, "dataset": dataset})


def _step(setup: TrainingSetup, record: list[Crossing], images: int, width: int | None) -> tuple[list[Crossing], int]:
    """Take a step on so many images, or on features of this width. Return what it exchanged, and its calls of torch."""
    batch = blank_batch(setup, images, width)
    record.clear()
    with NoArithmetic(), _Calls() as calls:
        TrainingStep(setup)(batch, setup.progress(0))
    return list(record), calls.count


def blank_batch(setup: TrainingSetup, images: int, width: int | None = None) -> Batch:
    """Return so many black images, or features of this width, as a batch; with its partner if the stage pairs them.

    Where a stage mixes images the batch is mixed, whatever its first step would be: two sets of labels cost more.
    """
    rarest = int(setup.dataset.counts_C.argmin())  # a class that every expert of any method learns
    streams = [setup.batches] if setup.partners is None else [setup.batches, setup.partners]
    blank = [blank_batches(stream, rarest, images) for stream in streams]
    if width is None:
        batches = [_mix(stream.batch(1, 0), stream) for stream in blank]
    else:
        features = [torch.zeros(1, width, dtype=setup.dtype) for _ in setup.model.experts]
        batches = [next(stream.of_features(features, 1)) for stream in blank]
    return batches[0] if setup.partners is None else replace(batches[0], partner=batches[1])


def _mix(batch: Batch, stream: TrainBatches) -> Batch:
    if stream.mixing is None or batch.mixed is not None:
        return batch
    half = batch.images_B3HW.new_tensor(0.5)
    return replace(batch, mixed=Mixed(half, half, batch.labels_B, batch.global_labels, batch.host_labels))


def _traffic(few: list[Crossing], more: list[Crossing]) -> Iterator[Traffic]:
    """Tell bytes that grow with the images from those that do not, in two records of the same step."""
    sums = [defaultdict[tuple[str, Kind, int], int](int) for _ in (few, more)]
    times = Counter((crossing.what, crossing.kind, crossing.among) for crossing in few)
    for found, record in zip(sums, (few, more), strict=True):
        for crossing in record:
            found[crossing.what, crossing.kind, crossing.among] += crossing.bytes
    assert sums[0].keys() == sums[1].keys(), "the exchanges of a step must not depend on the number of images"
    for (what, kind, among), low in sums[0].items():
        per_image, rest = divmod(sums[1][what, kind, among] - low, _MORE - _FEW)
        assert rest == 0, f"{what}: bytes must grow evenly with the images"
        yield Traffic(what, kind, among, low - _FEW * per_image, per_image, times[what, kind, among])


class _EngineOnPaper(TorchEngine):
    """The control engine, but for the weights, which stay."""

    def move(self, gradients: Sequence[Tensor], lr: float) -> None:
        """See `TorchEngine.move`."""


class _ZeroOnPaper(_EngineOnPaper):
    """The same in the place of DeepSpeed's engine, with ZeRO's exchanges."""

    def step(self, gradients: Sequence[Tensor], loss: Tensor, lr: float) -> Tensor:
        """See `Engine.step`."""
        self.sum_gradients(gradients)
        return check(self.ok, self.mesh.groups.everyone, loss, gradients)

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Record what ZeRO exchanges for each leaf: its gradient, and the weights after the step."""
        super().sum_gradients(gradients)
        for leaf in self.leaves:
            group, number = group_of(leaf, self.mesh), leaf.flat.detach()[0]
            if group.size > 1:
                # ZeRO pads each leaf to a multiple of twice the workers.
                own = 2 * -(-leaf.flat.numel() // (2 * group.size))
                group.all_gather(number.expand(own), f"updated weights, {IN_WORDS[leaf.part]} (ZeRO)")


# Sizes


def size_without_steps(config: RunConfig, stage: str, num_classes: int) -> tuple[dict[str, int], Costs]:
    """Return the numbers in a stage's ensemble, by "trunk", "shared" and expert, and the costs of its parts."""
    with NoArithmetic():
        model = build_ensemble(config.ensemble(stage, num_classes), seed=config.seed)
    return _parameters(model), costs_of(model, config.dataset.image_size)


def _parameters(model: Ensemble) -> dict[str, int]:
    held = {"trunk": 0, "shared": 0, **dict.fromkeys(model.names, 0)}
    for name, parameter in model.named_parameters():
        if part_of(name) not in TRAINING_ONLY:
            words = name.split(".")
            held[words[1] if words[0] == "experts" else words[0]] += parameter.numel()
    return held


def _auxiliary_bytes(model: Ensemble) -> int:
    """Return the bytes of what an ensemble has only while it trains."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if part_of(name) in TRAINING_ONLY)


def _learning(leaves: Leaves) -> dict[str, list[int]]:
    """Return the numbers that learn, by part of the ensemble, for each learning rate."""
    return {part: [number_of(leaf) for leaf in leaves.of(part)] for part in PARTS}


# Work


def costs_of(model: Ensemble, image_size: int) -> Costs:
    """Return the cost of each part of an ensemble in a forward pass on an image of this many pixels across.

    The ensemble is left in evaluation mode.
    """
    model.eval()
    expert = model.members()[0]
    head = expert.head
    if "head" in model.shared:
        head = model.shared["head"]
    trunk, shape = multiply_adds_by_shape(model.trunk, (1, 3, image_size, image_size))
    features, shape = multiply_adds_by_shape(expert.features, shape)
    found = torch.zeros(shape, dtype=next(expert.parameters()).dtype)  # heads and gates are small, and run as they are
    gate = 0 if expert.gate is None else multiply_adds(expert.gate, found)
    return Costs(trunk, features, multiply_adds(head, found), gate, width=shape[1])


class _Work:
    """While open, adds to a load the work of the images that pass through the parts of some ensembles."""

    def __init__(self, load: Load, ensembles: Iterable[tuple[str, Ensemble]], costs: Mapping[str, Costs]) -> None:
        self._load = load
        self._hooks = [
            part.register_forward_hook(partial(self._count, cost, name if part in _trunks(model) else None))
            for name, model in ensembles
            for part, cost in _parts(model, costs[name])
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(
        self, cost: int, trunk_of: str | None, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        # A flow may run a module on part of the images, or twice; work counts per image of the batch.
        # Features that go through a shared head are [e, B, D].
        images = inputs[0].shape[0] * (inputs[0].shape[1] if inputs[0].ndim == 3 else 1) / _FEW
        learns = any(p.requires_grad for p in module.parameters())
        # Backward costs as much as forward for the gradient of the input, and again for that of the weights.
        # Copies of the network run without gradients.
        backward = 1 + learns if output.requires_grad else 0
        self._load.work += images * cost
        self._load.training_work += images * cost * (1 + backward)
        if trunk_of is not None:
            self._load.trunk_work[trunk_of] = self._load.trunk_work.get(trunk_of, 0.0) + images * cost


class _Calls(TorchFunctionMode):
    """While open, counts the functions of torch that are called and give a tensor; twice where gradients are on.

    Attributes:
        count: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.count += 1 + torch.is_grad_enabled()
        return found


def _trunks(model: Ensemble) -> list[nn.Module]:
    """Return the trunk, and its copy if there is one."""
    return [model.trunk] if model.trunk_copy is None else [model.trunk, model.trunk_copy]


def _parts(model: Ensemble, costs: Costs) -> Iterator[tuple[nn.Module, int]]:
    """Yield the parts of an ensemble whose work counts, and their cost per image."""
    yield from ((trunk, costs.trunk) for trunk in _trunks(model))
    for expert in model.members():
        yield expert.features, costs.features
        embeds = [auxiliary.embed for auxiliary in auxiliaries_of(expert).values()]
        if expert.momentum_copy is not None:
            yield expert.momentum_copy["features"], costs.features
            embeds += expert.momentum_copy["embed"].children()
        for embed in embeds:
            dtype = next((p.dtype for p in embed.parameters()), torch.float32)
            yield embed, multiply_adds(embed, torch.zeros(2, costs.width, dtype=dtype)) // 2
        if expert.gate is not None:
            yield expert.gate, costs.gate
        if "head" not in model.shared:
            yield expert.head, costs.head
    if "head" in model.shared:
        yield model.shared["head"], costs.head
