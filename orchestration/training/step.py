"""One training step on one worker: from a batch of images to moved weights. trainer.py shows it in ten lines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from experts.batches import Batch
from experts.batches import share as share_of
from experts.draws import RowDraws
from experts.objective import ExtraInputs, StepContext
from experts.progress import Progress
from orchestration.training.engine import NonFiniteGradient
from orchestration.training.stage_setup import TrainingSetup

# Shapes: E experts, B images of one replica, X outputs of an expert (C class scores and, for some objectives, more).


class TrainingDiverged(FloatingPointError):
    """The loss or a gradient is not finite. The run ends here; its newest checkpoint is from before."""


class TrainingStep:
    """Takes one step at a time with a stage's network, objective and engine."""

    def __init__(self, setup: TrainingSetup) -> None:
        self._setup = setup

    def __call__(self, batch: Batch, now: Progress) -> tuple[float, dict[str, float]]:
        """Move the weights by one batch. Every worker of the mesh must take part.

        Returns:
            The learning rate, and the mean per image of the "loss" and of its terms over the global batch.

        Raises:
            TrainingDiverged: names stage, epoch, step and what is not finite. Every worker raises it for a loss, those
                that hold the parameter for a gradient.
        """
        setup = self._setup
        self._set_mode()
        lr = setup.optimizer.lr * setup.schedule.factor(now)
        before = setup.mesh.statistics_before(setup.model.trunk) if setup.flow.own_streams else []

        outputs_EBX = setup.flow(setup.engine, batch, now, setup.mesh.gather)
        loss, terms = self._loss(outputs_EBX, batch, now)
        values = self._global_values(loss, terms)

        # Before the weights move: one bad step would spoil them, and the checkpoint after it. The value is the sum over
        # the replicas, so all workers raise together.
        if not np.isfinite(values["loss"]):
            raise TrainingDiverged(self._diagnosis(outputs_EBX, now))
        try:
            setup.engine.step(loss, lr)
        except NonFiniteGradient as problem:
            raise TrainingDiverged(f"{self._moment(now)}: {problem}; {_ADVICE}") from problem

        if setup.flow.own_streams:  # copies of the trunk saw different images; one trunk would have seen them in turn
            setup.mesh.statistics_in_turn(setup.model.trunk, before)
        return lr, values

    def _set_mode(self) -> None:
        """Put the network in training mode, frozen parts as the stage says (evaluation may have come before)."""
        self._setup.model.train()
        if self._setup.stage.frozen_batchnorm == "eval":
            for module in self._setup.frozen:
                module.eval()

    def _loss(self, outputs_EBX: Tensor, batch: Batch, now: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this replica's share of the loss and its terms; with mixup, blended from both sets of labels."""
        setup = self._setup
        extra = ExtraInputs(setup.teachers(batch.images_B3HW) if setup.teachers else {}, batch.positions_B)

        # Mixup blends the losses of two sets of labels; without it there is one set, with a share of 1.
        parts = [(1.0, *setup.flow.labels(batch))]
        if batch.mixed is not None:
            rest = 1 - batch.mixed.share
            parts = [(batch.mixed.share, *parts[0][1:]), (rest, batch.mixed.labels_B, batch.mixed.global_labels)]
        seen_EBX, first_row, replicas = outputs_EBX, batch.first_row, 1
        if whole := setup.objective.config.whole_batch:  # every replica evaluates the loss of all images
            replicas, images = setup.mesh.shape.replicas, len(batch.global_labels)
            seen_EBX = setup.mesh.batch_rows(outputs_EBX, images)
            first_row -= share_of(images, setup.mesh.replica, replicas)[0]
        total, terms = outputs_EBX.new_zeros(()), dict[str, Tensor]()
        for label_set, (share, labels, global_labels) in enumerate(parts):
            size = seen_EBX.shape[1]
            draws = RowDraws(setup.draws, now.epoch, first_row, size, seen_EBX.device, label_set)
            given = replace(extra, draws=draws)
            context = StepContext(setup.objective.denominators(global_labels, now), now, given)
            loss, found = setup.objective(seen_EBX, global_labels if whole else labels, context)
            total = total + share * loss
            terms = {name: share * value + terms.get(name, 0.0) for name, value in found.items()}
        if replicas > 1:  # values are summed over the replicas, which all have the whole one; gradients are of own rows
            total = total - (1 - 1 / replicas) * total.detach()
            terms = {name: value / replicas for name, value in terms.items()}

        if setup.distillation is not None:
            denominators = setup.distillation.denominators(batch.global_labels)
            total, found = setup.distillation(total, outputs_EBX, extra.teachers, denominators, now)
            terms |= found
        return total, terms

    def _global_values(self, loss: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
        """Sum loss and terms over the replicas; a term with a value per expert becomes `<term>/<expert>`."""
        names, values = ["loss"], [loss.detach().reshape(1)]
        for term, value in terms.items():
            experts = self._setup.expert_names if value.ndim else ()
            names += [f"{term}/{expert}" for expert in experts] or [term]
            values.append(value.detach().reshape(-1))
        total = self._setup.mesh.sum_over_data(torch.cat([v.double() for v in values]), "loss and its terms")
        return dict(zip(names, total.tolist(), strict=True))

    def _moment(self, now: Progress) -> str:
        done = (now.epoch - 1) * now.steps_per_epoch + now.step
        return f"stage {self._setup.stage_name}, epoch {now.epoch}, step {done + 1}"

    def _diagnosis(self, outputs_EBX: Tensor, now: Progress) -> str:
        """Return the message of a loss that is not finite; names the experts whose outputs are not."""
        bad_E = (~torch.isfinite(outputs_EBX)).flatten(1).any(1).double()
        self._setup.mesh.sum_over_data(
            bad_E, "experts whose outputs are not finite"
        )  # the images may be another replica's
        bad = [name for name, count in zip(self._setup.expert_names, bad_E.tolist(), strict=True) if count]
        where = f"logits of {', '.join(bad)}" if bad else "the objective, from finite logits"
        return f"{self._moment(now)}: the loss is not finite; found in {where}; needed finite numbers; {_ADVICE}"


_ADVICE = (
    "lower method.stages.<stage>.optimizer.lr or lengthen its warm-up, and look at the last train/loss values in "
    "metrics.jsonl; the newest checkpoint is from before"
)
