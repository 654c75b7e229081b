"""One training step on one worker: from a batch of images to moved weights. trainer.py shows it in ten lines.

The host asks for work and waits for none of it. What it wants to know of a step lies in a `Row` on the device, which
the trainer reads after many steps. Then it says what was not finite, if anything was: from that step on no weight has
moved (engine.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experts.batches import Batch
from experts.batches import share as share_of
from experts.data.transfer import to_device
from experts.draws import Moment
from experts.objective import ExtraInputs, StepContext
from experts.progress import Progress
from orchestration.training.auxiliaries import Watched
from orchestration.training.graphs import StepGraphs, graphs_for
from orchestration.training.stage_setup import TrainingSetup

# Shapes: E experts, B images of one replica, X outputs of an expert (C class scores and, for some objectives, more),
# L leaves.


class TrainingDiverged(FloatingPointError):
    """The loss or a gradient is not finite. The run ends here; its newest checkpoint is from before."""


@dataclass(frozen=True)
class Row:
    """All that the host wants to know of a step, in one tensor on the device.

    Attributes:
        now: the moment of the step.
        lr: base learning rate.
        images: of the global batch.
        names: of the values: "loss" and its terms, a term with a value per expert as `<term>/<expert>`.
        numbers: float64: the values, means per image over the global batch; a number for each expert that is 0 unless
            its outputs were not finite; the index of each leaf's first gradient that was not finite, or -1; and 1 where
            the weights moved, else 0.
    """

    now: Progress
    lr: float
    images: int
    names: list[str]
    numbers: Tensor


@dataclass(frozen=True)
class Computed:
    """Results of the work that a step does before weights move, on the device.

    Attributes:
        names: see `Row`.
        values: of this replica's share of the batch, summed over all replicas: the named values, then a number per
            expert that is 0 unless its outputs are not finite; float64.
        gradients: of this worker's share of the loss, one flat tensor per leaf.
        watched: what comes after the step reads, without gradients; None where nothing does.
    """

    names: list[str]
    values: Tensor
    gradients: list[Tensor]
    watched: Watched | None = None


class TrainingStep:
    """Takes one step at a time with a stage's network, objective and engine.

    Args:
        setup: of the stage.
        report: takes a sentence that an operator should read.
    """

    def __init__(self, setup: TrainingSetup, report: Callable[[str], None] = lambda _: None) -> None:
        self._setup = setup
        found = (setup.flow, setup.objective, setup.distillation, *setup.auxiliaries.pieces)
        self._pieces = [piece for piece in found if piece is not None]
        backend = graphs_for(setup.config.engine, setup.mesh.device, *self._pieces)
        self._graphs = StepGraphs(self._compute, setup.step_draws, backend, report)

    def __call__(self, batch: Batch, now: Progress) -> Row:
        """Move the weights by one batch, unless something was not finite. Every worker of the mesh must take part."""
        setup = self._setup
        self._set_mode()
        lr = setup.optimizer.lr * setup.schedule.factor(now)
        setup.step_draws.begin(self._moment(batch, now))
        before = setup.mesh.statistics_before(setup.model.trunk) if setup.flow.own_streams else []

        found = self._graphs(batch, now, tuple(piece.phase(now) for piece in self._pieces))
        places_L = setup.engine.step(found.gradients, found.values[0], lr)
        if found.watched is not None:
            setup.auxiliaries.update(found.watched, lr, setup.engine.ok)

        if setup.flow.own_streams:  # copies of the trunk saw different images; one trunk would have seen them in turn
            setup.mesh.statistics_in_turn(setup.model.trunk, before)
        numbers = torch.cat([found.values, places_L, setup.engine.ok.reshape(1)])
        return Row(now, lr, len(batch.global_labels), found.names, numbers)

    def close(self) -> None:
        """Free what was captured; no step follows."""
        # It knows this object, too: left to Python's collector, a stage's memory would stay for a while.
        vars(self).pop("_graphs", None)

    def _moment(self, batch: Batch, now: Progress) -> Moment:
        images, mesh = len(batch.global_labels), self._setup.mesh
        first_of_batch = batch.first_row - share_of(images, mesh.replica, mesh.shape.replicas)[0]
        return Moment(now.epoch, now.step, batch.first_row, len(batch.labels_B), first_of_batch, images)

    def _compute(self, batch: Batch, now: Progress) -> Computed:
        """Return values and gradients of this worker's share of a batch. A graph may replay what this does."""
        setup = self._setup
        with setup.leaves.lent() as flats:
            outputs_EBX = setup.flow(setup.network, batch, now, setup.mesh.gather)
            # Here, because parameters of auxiliaries, too, are views of the leaves.
            found = setup.auxiliaries.losses(setup.network, batch, now) if setup.auxiliaries else None
        loss, terms = self._loss(outputs_EBX, batch, now)
        watched = None
        if found is not None:
            own_eA, watched = found
            share, more = setup.auxiliaries.counted(own_eA, setup.expert_names, now, setup.step_draws)
            assert not more.keys() & terms.keys(), f"terms {sorted(terms)} and auxiliaries {sorted(more)}"
            loss, terms = loss + share, terms | more
        names, values = self._global_values(loss, terms, outputs_EBX.detach())
        return Computed(names, values, _gradients(loss, flats), watched)

    def _set_mode(self) -> None:
        """Put the network in training mode, frozen parts as the stage says (evaluation may have come before)."""
        self._setup.model.train()
        if self._setup.stage.frozen_batchnorm == "eval":
            for module in self._setup.frozen:
                module.eval()

    def _loss(self, outputs_EBX: Tensor, batch: Batch, now: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this replica's share of the loss and its terms; of mixed images, blended from both sets of labels."""
        setup = self._setup
        scored = setup.flow.scored(batch)
        extra = ExtraInputs(setup.teachers(scored.images_B3HW) if setup.teachers else {}, scored.positions_B)

        # Mixed images have two sets of labels, whose losses are blended; others have one set, with a share of 1.
        parts: list[tuple[Tensor | float, Tensor, Tensor]] = [(1.0, *setup.flow.labels(batch))]
        made, own = setup.auxiliaries.made_labels(batch, now)
        if len(made):  # their scores lie below those of the batch
            here, everywhere = (to_device(labels, setup.mesh.device) for labels in (made[own], made))
            parts = [(1.0, torch.cat([parts[0][1], here]), torch.cat([parts[0][2], everywhere]))]
        if (mixed := batch.mixed) is not None:
            parts = [(mixed.share, *parts[0][1:]), (mixed.rest, mixed.labels_B, mixed.global_labels)]
        seen_EBX, replicas = outputs_EBX, 1
        if whole := setup.objective.config.whole_batch:  # every replica evaluates the loss of all images
            replicas, images = setup.mesh.shape.replicas, len(batch.global_labels)
            seen_EBX = setup.mesh.batch_rows(outputs_EBX, images)
        total, terms = outputs_EBX.new_zeros(()), dict[str, Tensor]()
        for label_set, (share, labels, global_labels) in enumerate(parts):
            draws = setup.step_draws
            of_rows = draws.of_rows(label_set, whole=whole, made=own)
            given = replace(extra, draws=of_rows, numbers=draws.of_labels(label_set))
            context = StepContext(setup.objective.denominators(global_labels, now), now, given)
            loss, found = setup.objective(seen_EBX, global_labels if whole else labels, context)
            total = total + share * loss
            terms = {name: share * value + terms.get(name, 0.0) for name, value in found.items()}
        if replicas > 1:  # values are summed over the replicas, which all have the whole one; gradients are of own rows
            total = total - (1 - 1 / replicas) * total.detach()
            terms = {name: value / replicas for name, value in terms.items()}
        total = setup.stage.objective_weight.times(total, "weight of the objective", now, setup.step_draws)

        if setup.distillation is not None:
            denominators = setup.distillation.denominators(batch.global_labels)
            total, found = setup.distillation(total, outputs_EBX, extra.teachers, denominators, now)
            terms |= found
        return total, terms

    def _global_values(self, loss: Tensor, terms: dict[str, Tensor], outputs_EBX: Tensor) -> tuple[list[str], Tensor]:
        """Return names and values as of `Computed`."""
        names, values = ["loss"], [loss.detach().reshape(1)]
        for term, value in terms.items():
            experts = self._setup.expert_names if value.ndim else ()
            names += [f"{term}/{expert}" for expert in experts] or [term]
            values.append(value.detach().reshape(-1))
        # 0, or NaN for an expert with outputs that are not finite; the images may be another replica's.
        values.append((outputs_EBX - outputs_EBX).flatten(1).sum(dim=1))
        total = torch.cat([v.double() for v in values])
        return names, self._setup.mesh.sum_over_data(total, "loss, its terms and checks")


def _gradients(loss: Tensor, flats: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of each leaf; zeros where the loss of this batch does not depend on it."""
    if not flats or not loss.requires_grad:
        return [torch.zeros_like(flat) for flat in flats]
    return list(torch.autograd.grad(loss, flats, allow_unused=True, materialize_grads=True))


def read(rows: Sequence[Row]) -> list[list[float]]:
    """Return the numbers of some rows, after one wait for the device."""
    numbers = torch.cat([row.numbers for row in rows]).tolist()
    found, first = [], 0
    for row in rows:
        found.append(numbers[first : first + len(row.numbers)])
        first += len(row.numbers)
    return found


def problem(setup: TrainingSetup, row: Row, numbers: Sequence[float]) -> str | None:
    """Return what was not finite in a step that did not move the weights; None where nothing was, on this worker.

    Args:
        setup: of the stage.
        row: of the step.
        numbers: those of the row.
    """
    values, rest = numbers[: len(row.names)], numbers[len(row.names) : -1]
    outputs_E, places_L = rest[: len(setup.expert_names)], rest[len(setup.expert_names) :]
    done = (row.now.epoch - 1) * row.now.steps_per_epoch + row.now.step
    moment = f"stage {setup.stage_name}, epoch {row.now.epoch}, step {done + 1}"
    if not math.isfinite(values[0]):
        bad = [name for name, number in zip(setup.expert_names, outputs_E, strict=True) if number != 0]
        named = setup.auxiliaries.configs
        odd = [n for n, v in zip(row.names, values, strict=True) if n.split("/")[0] in named and not math.isfinite(v)]
        where = "the objective, from finite logits"
        if bad or odd:
            where = f"logits of {', '.join(bad)}" if bad else f"auxiliary {', '.join(odd)}, from finite logits"
        return f"{moment}: the loss is not finite; found in {where}; needed finite numbers; {_ADVICE}"
    found = [leaf.name_at(int(place)) for leaf, place in zip(setup.leaves, places_L, strict=True) if place >= 0]
    if not found:
        return None
    return f"{moment}: gradient is not finite in {', '.join(found)} (the first of each part); {_ADVICE}"


_ADVICE = (
    "lower method.stages.<stage>.optimizer.lr or lengthen its warm-up, and look at the last train/loss values in "
    "metrics.jsonl; the newest checkpoint is from before"
)
