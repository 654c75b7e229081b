"""Rehearse one step of a stage on two blank images in this process, and record what a worker computes and exchanges.

The stage's own flow and objective run on the parts that a worker of one slot holds, and their requests are recorded.
So a plan covers every flow, also one that is written later. Nothing learns, no data is read, no other process is used.

rehearse
    build objective, flow and the slot's experts      as the worker would
    hook every module                                 `_count_work`, `_count_norm`
    run flow, then objective                          `gather` records what crosses between slots

Shapes: E experts, e in one slot, B = 2 images, C classes, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aggregation.serving import DESCRIPTION, read_description
from experts.backbones.cost import multiply_adds
from experts.batches import Batch
from experts.data.keyed_random import key
from experts.ensemble import Ensemble, EnsembleConfig, build_ensemble, freeze
from experts.flow import Flow, Result
from experts.objective import ExtraInputs, Objective, StepContext
from experts.progress import Progress
from experts.registry import build, piece
from orchestration.config.paths import expand
from orchestration.config.recipe import Teacher
from orchestration.config.recipe_checks import parts_that_learn
from orchestration.config.run_config import RunConfig
from orchestration.training.engine import casting, lr_groups
from orchestration.training.mesh import MeshShape

_IMAGES = 2  # BatchNorm cannot train on one value
_LARGEST = 32  # pixels; exchanges do not depend on the size of the images
_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Costs:
    """Multiply-adds per image in a forward pass of the trunk, of one expert's late stages, of a head and of a gate."""

    trunk: int
    features: int
    head: int
    gate: int


@dataclass
class Norms:
    """Calls of BatchNorm layers in training mode during one step.

    Attributes:
        layers: number of calls.
        channels: sum of their channels.
        back: sum of the channels that a gradient comes back through.
    """

    layers: int = 0
    channels: int = 0
    back: int = 0


@dataclass
class Load:
    """The load of one step on a worker of one slot.

    Attributes:
        parameters: numbers held, by "trunk", "shared" and expert.
        learning: numbers that learn, by "trunk", "experts" and "shared", one entry per learning rate.
        logits: bytes per image of every exchange of outputs between slots.
        norms: BatchNorms in training mode.
        terms: numbers in the loss and its terms.
        in_turn: numbers in the trunk's running statistics if each slot's trunk sees its own images, else 0.
        trunk_work, work: multiply-adds per image in forward passes of the trunk, and of everything. An image and its
            partner count as one.
        training_work: the same with backward passes.
    """

    parameters: dict[str, int]
    learning: dict[str, list[int]]
    logits: list[int] = field(default_factory=list)
    norms: Norms = field(default_factory=Norms)
    terms: int = 0
    in_turn: int = 0
    trunk_work: float = 0.0
    work: float = 0.0
    training_work: float = 0.0


def rehearse(config: RunConfig, stage: str, counts_C: np.ndarray, shape: MeshShape, slot: int, costs: Costs) -> Load:
    """Rehearse one step of a stage.

    Args:
        config: validated.
        stage: name of the stage.
        counts_C: training images per class that the stage sees.
        shape: of the mesh.
        slot: the slot whose experts are held.
        costs: from `costs_of`.

    Raises:
        ValueError: a piece refuses the classes or the number of experts.
    """
    return _Rehearsal(config, stage, counts_C, shape, slot).run(costs)


def costs_of(config: RunConfig, stage: str, num_classes: int) -> Costs:
    """Return the cost of each part of a stage's ensemble in a forward pass, at the size of the run's images."""
    model = _ensemble(config, stage, num_classes, config.method.names_in(stage)[:1])
    expert = model.members()[0]
    image = torch.zeros(1, 3, config.dataset.image_size, config.dataset.image_size)
    with torch.no_grad():
        h = model.trunk.eval()(image)
        features = expert.features.eval()(h)
    head = expert.head
    if "head" in model.shared:
        head = model.shared["head"]
    return Costs(
        multiply_adds(model.trunk, image),
        multiply_adds(expert.features, h),
        multiply_adds(head, features),
        0 if expert.gate is None else multiply_adds(expert.gate, features),
    )


def _ensemble(config: RunConfig, stage: str, num_classes: int, only: tuple[str, ...]) -> Ensemble:
    return build_ensemble(config.ensemble(stage, num_classes), seed=config.seed, only=only)


def held_by_part(config: RunConfig, stage: str, num_classes: int) -> dict[str, int]:
    """Return the numbers in a stage's ensemble, by "trunk", "shared" and expert."""
    return _numbers(_ensemble(config, stage, num_classes, config.method.names_in(stage)))


def _numbers(model: Ensemble) -> dict[str, int]:
    parts = {"trunk": model.trunk, "shared": model.shared, **model.experts}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


class _Rehearsal:
    """A worker's parts of a stage, offered to its flow as a `Network`."""

    def __init__(self, config: RunConfig, stage: str, counts_C: np.ndarray, shape: MeshShape, slot: int) -> None:
        method, engine = config.method, config.engine
        self.config, self.stage, self.shape = config, method.stages[stage], shape
        self.expert_names = method.names_in(stage)
        self.held = list(shape.experts_of(slot))
        self.names = tuple(self.expert_names[i] for i in self.held)
        self.same_order = engine.name == "deepspeed" and engine.zero_stage == 2 and shape.workers > 1
        self.dtype = torch.float64 if engine.precision == "float64" else torch.float32
        self.rarest, self.num_classes = int(counts_C.argmin()), len(counts_C)
        self.objective: Objective = build(
            "objective", self.stage.objective, torch.from_numpy(counts_C), len(self.expert_names)
        )
        self.objective.assume_prepared()  # what it would take from the data does not change sizes
        self.objective.to(dtype=self.dtype)
        draws = partial(key, config.seed, stage)
        self.flow: Flow = build("flow", self.stage.flow, self.objective, self.expert_names, draws)
        self.model = _ensemble(config, stage, self.num_classes, self.names).to(self.dtype).train()

        frozen = freeze(self.model, parts_that_learn(config.method, stage))
        if self.stage.frozen_batchnorm == "eval":
            for module in frozen:
                module.eval()
        self.load = Load(_numbers(self.model), self._learning())

    def _learning(self) -> dict[str, list[int]]:
        factors = dict(zip(self.expert_names, self.objective.lr_factors, strict=True))
        found = {}
        for part in ("trunk", "experts", "shared"):
            named = [(n, p) for n, p in self.model.named_parameters() if n.startswith(f"{part}.") and p.requires_grad]
            groups = lr_groups(named, factors, self.stage.lr_factors.model_dump())
            found[part] = [sum(p.numel() for p in group["params"]) for group in groups]
        return found

    # The `Network` that a flow runs

    def trunk(self, run: Callable[[nn.Module], Result]) -> Result:
        return self._run(run, self.model.trunk)

    def experts(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        return self._run(run, self.model.experts)

    def shared(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        return self._run(run, self.model.shared)

    def _run(self, run: Callable[[Any], Result], module: nn.Module) -> Result:
        with casting(self.config.engine, _DEVICE):
            return run(module)

    def gather(self, own: Tensor, /, what: str = "logits") -> Tensor:
        """Return all experts' outputs, zeros for other slots; record the bytes that a worker would contribute."""
        self.load.logits.append(own.numel() * own.element_size() // _IMAGES)
        everyone = own.new_zeros(len(self.expert_names), *own.shape[1:])
        everyone[self.held] = own
        return everyone

    # The step and what is recorded of it

    def run(self, costs: Costs) -> Load:
        """Run the flow and the objective. Returns what they required."""
        self._hook(costs)
        if self.flow.own_streams:
            self.load.in_turn = sum(buffer.numel() for buffer in self.model.trunk.buffers())
        batch = self._batch()
        if self.flow.needs_partner:
            batch = replace(batch, partner=batch)
        now = Progress(1, self.stage.epochs, 0, 1)
        with torch.enable_grad():
            outputs_EBX = self.flow(self, batch, now, self.gather)
        self.load.terms = 1 + self._terms(outputs_EBX.detach(), batch, now)
        return self.load

    def _batch(self) -> Batch:
        size = min(self.config.dataset.image_size, _LARGEST)
        labels_B = torch.full((_IMAGES,), self.rarest)  # a class that every expert of any method learns
        images_B3HW = torch.zeros(_IMAGES, 3, size, size, dtype=self.dtype)
        return Batch(images_B3HW, labels_B, labels_B, torch.arange(_IMAGES))

    def _hook(self, costs: Costs) -> None:
        parts: list[tuple[nn.Module, int]] = [(self.model.trunk, costs.trunk)]
        for expert in self.model.members():
            parts.append((expert.features, costs.features))
            if expert.gate is not None:
                parts.append((expert.gate, costs.gate))
            if "head" not in self.model.shared:
                parts.append((expert.head, costs.head))
        if "head" in self.model.shared:
            parts.append((self.model.shared["head"], costs.head))
        for part, cost in parts:
            part.register_forward_hook(partial(self._count_work, cost))
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._count_norm)

    def _count_work(self, cost: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A flow may run a module on part of the images, or twice; work counts per image of the batch.
        # Features that go through a shared head are [e, B, D].
        images = inputs[0].shape[0] * (inputs[0].shape[1] if inputs[0].ndim == 3 else 1) / _IMAGES
        learns = any(p.requires_grad for p in module.parameters())
        # Backward costs as much as forward for the gradient of the input, and again for that of the weights.
        backward = 1 + learns if output.requires_grad else 0
        self.load.work += images * cost
        self.load.training_work += images * cost * (1 + backward)
        if module is self.model.trunk:
            self.load.trunk_work += images * cost

    def _count_norm(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training and isinstance(module, nn.BatchNorm2d):
            norms = self.load.norms
            norms.layers += 1
            norms.channels += module.num_features
            norms.back += module.num_features if output.requires_grad else 0

    def _terms(self, outputs_EBX: Tensor, batch: Batch, now: Progress) -> int:
        """Count the numbers in the loss's terms; a term has one for all experts or one for each."""
        extra = ExtraInputs(self._scores(), batch.positions_B)
        labels, global_labels = self.flow.labels(batch)
        context = StepContext(self.objective.denominators(global_labels, now), now, extra)
        loss, terms = self.objective(outputs_EBX, labels, context)
        if self.stage.distillation is not None:
            distillation = build("distillation", self.stage.distillation)
            denominators = distillation.denominators(batch.global_labels)
            terms = terms | distillation(loss, outputs_EBX, extra.teachers, denominators, now)[1]
        return sum(value.numel() for value in terms.values())

    def _scores(self) -> dict[str, Tensor]:
        """Return blank scores of every teacher, for the classes that the objective expects it to know."""
        known = self.objective.teacher_classes
        return {
            name: torch.zeros(_IMAGES, len(known.get(name, range(self.num_classes))), dtype=self.dtype)
            for name in self.stage.teachers
        }


@dataclass(frozen=True)
class TeacherLoad:
    """The load of a frozen teacher on the workers. Its experts are dealt out to the slots.

    Attributes:
        num_experts, num_classes: of the teacher.
        trunk, expert: numbers held by each slot with experts, and for each expert. A shared head counts with the
            trunk; a router's gates do not count.
        trunk_work, expert_work: multiply-adds per image.
        trunk_norms, expert_norms: layers and channels of the BatchNorms that normalise by the batch.
    """

    num_experts: int
    num_classes: int
    trunk: int
    expert: int
    trunk_work: int
    expert_work: int
    trunk_norms: tuple[int, int]
    expert_norms: tuple[int, int]

    def held(self, experts: int) -> int:
        """Return the numbers held in a slot with so many experts."""
        return self.trunk + experts * self.expert if experts else 0

    def work(self, experts: int) -> int:
        """Return the multiply-adds per image in a slot with so many experts."""
        return self.trunk_work + experts * self.expert_work if experts else 0

    def norms(self, experts: int) -> Norms:
        """Return the BatchNorms of a slot with so many experts."""
        if not experts:
            return Norms()
        layers, channels = (a + experts * b for a, b in zip(self.trunk_norms, self.expert_norms, strict=True))
        return Norms(layers, channels)


def teacher_load(config: RunConfig, teacher: Teacher, num_classes_in: Callable[[str], int]) -> TeacherLoad | None:
    """Return what a teacher requires, or None if it is a run that is missing or cannot be read.

    Args:
        config: of the run that learns.
        teacher: a stage of this run, or another run.
        num_classes_in: classes that a stage of this run knows.
    """
    if teacher.stage is not None:
        names, num_classes = config.method.names_in(teacher.stage), num_classes_in(teacher.stage)
        model = _ensemble(config, teacher.stage, num_classes, names[:1])
    else:
        assert teacher.run is not None
        try:
            found = read_description(Path(expand(teacher.run)) / "export" / teacher.weights / DESCRIPTION)
        except ValueError:
            return None
        names, num_classes = found.expert_names, found.num_classes
        model = build_ensemble(
            EnsembleConfig(
                _settings("model", found.backbone),
                _settings("head", found.head),
                num_classes=num_classes,
                expert_names=names,
                reduce_dimension=found.reduce_dimension,
                shared_head=found.shared_head,
            ),
            seed=0,
            only=names[:1],
        )
    expert = model.members()[0]
    image = torch.zeros(1, 3, config.dataset.image_size, config.dataset.image_size)
    with torch.no_grad():
        h = model.trunk.eval()(image)
        scores = expert.eval()(h)
    head = multiply_adds(model.shared["head"], scores) if "head" in model.shared else 0
    live = teacher.mode == "train"
    shared_head = [p for name, p in model.shared.named_parameters() if name.startswith("head.")]
    return TeacherLoad(
        num_experts=len(names),
        num_classes=num_classes,
        trunk=sum(p.numel() for p in [*model.trunk.parameters(), *shared_head]),
        expert=sum(p.numel() for part in (expert.features, expert.head) for p in part.parameters()),
        trunk_work=multiply_adds(model.trunk, image),
        expert_work=multiply_adds(expert, h) + head,
        trunk_norms=_norms(model.trunk) if live else (0, 0),
        expert_norms=_norms(expert) if live else (0, 0),
    )


def _settings(kind: str, values: dict[str, Any]) -> Any:
    return piece(kind, values["name"]).Config.model_validate(values)


def _norms(module: nn.Module) -> tuple[int, int]:
    channels = [part.num_features for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    return len(channels), sum(channels)
