"""Whole splits through a stage's network, without gradients: scores of the ensemble, and teachers' scores.

Shapes: E experts, B images of one replica, C classes, K numbers that an aggregator keeps per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from aggregation.aggregator import Outputs
from aggregation.predictions import Predictions
from aggregation.tally import States, Tally
from experts.batches import Replica
from experts.eval_batches import EvalBatches
from experts.objective import ExtraInputs
from orchestration.training.precision import casting
from orchestration.training.stage_setup import StageSetup, TrainingSetup


@torch.no_grad()
def evaluate(setup: StageSetup, split: str, beat: Callable[[], None]) -> States | None:
    """Score this replica's share of a split. Every worker must take part.

    Args:
        setup: of the stage.
        split: "test" or "val".
        beat: called after every batch.

    Returns:
        The states of `Scores` and `Diversity` on workers of the first slot, None on the others.

    Raises:
        ValueError: scores are not finite, or the aggregator cannot be applied to these weights.
    """
    tally = Tally(setup.aggregator, setup.expert_names)
    for outputs, labels_B in _outputs(setup, split):
        if setup.mesh.slot == 0:  # after the gather every slot holds the same; one counts
            tally.add(outputs, labels_B)
        beat()
    states = tally.states() if setup.mesh.slot == 0 else None
    beat()  # the host has waited for the device
    return states


@torch.no_grad()
def predict(setup: StageSetup, split: str, beat: Callable[[], None], *, logits: bool) -> Predictions | None:
    """Return what the ensemble and its experts say of this replica's share of a split. Every worker must take part.

    Args:
        setup: of the stage.
        split: "test" or "val".
        beat: called after every batch.
        logits: whether to keep the scores of all classes, too.

    Returns:
        None on workers that are not of the first slot, and for a share without images.

    Raises:
        ValueError: as `evaluate`.
    """
    parts = []
    for outputs, labels_B in _outputs(setup, split):
        if setup.mesh.slot == 0 and len(labels_B):
            experts = dict(zip(setup.expert_names, outputs.logits_EBC.unbind(), strict=True))
            members = {**setup.aggregator.members(outputs), **experts}
            parts.append(Predictions.of_batch(members, labels_B, logits=logits))
        beat()
    return Predictions.joined(parts) if parts else None


def _outputs(setup: StageSetup, split: str) -> Iterator[tuple[Outputs, Tensor]]:
    """Yield what the experts say of this replica's share of a split, with the labels. Every worker must take part.

    Raises:
        ValueError: the aggregator cannot be applied to these weights.
    """
    mesh = setup.mesh
    if not setup.config.engine.sync_batchnorm:  # replicas have statistics of their own: all score with the first's
        mesh.broadcast_buffers(setup.model)
    setup.model.eval()  # the next step sets the training mode again
    numbers_EK = setup.numbers_of_experts()
    setup.aggregator.check(numbers_EK)
    batches = EvalBatches(setup.scored(split), setup.dataset.config, setup.scored_at_once, setup.replica)
    for images_B3HW, labels_B in batches:
        with casting(setup.config.engine, mesh.device):
            logits_EBC, gates_EB = setup.model.outputs(images_B3HW, mesh.gather)
        yield Outputs(logits_EBC, numbers_EK, gates_EB), labels_B


def prepare_objective(setup: TrainingSetup, beat: Callable[[], None]) -> None:
    """Let the objective look at whole splits before the first step of a stage; most have no need to.

    Args:
        setup: of the stage.
        beat: called after every batch.

    Raises:
        ValueError: the objective needs a validation split and the data set has none.
    """
    if setup.stage.objective.prepares:
        setup.model.eval()
        setup.objective.prepare(lambda split: _teacher_scores(setup, split, beat))
        beat()


@torch.no_grad()
def _teacher_scores(setup: TrainingSetup, split: str, beat: Callable[[], None]) -> Iterator[tuple[ExtraInputs, Tensor]]:
    """Yield teachers' scores and the labels of a whole split, the same on every worker.

    Args:
        setup: of the stage.
        split: "train", not augmented, or "val".
        beat: called after every batch.
    """
    images: Any = setup.dataset.train_as_evaluated() if split == "train" else setup.dataset.val
    if images is None:
        raise ValueError(
            f"objective '{setup.stage.objective.name}' needs a validation split, which dataset "
            f"{setup.dataset.config.name} has not; set dataset.val_per_class (cut from the training pool) or "
            f"dataset.val_list; the test set is never used for this"
        )
    size, row = setup.scored_at_once, 0
    batches = EvalBatches(images, setup.dataset.config, size, Replica(device=setup.mesh.device, dtype=setup.dtype))
    for images_B3HW, labels_B in batches:
        positions_B = torch.arange(row, row + len(labels_B), device=setup.mesh.device)
        yield ExtraInputs(setup.teachers(images_B3HW), positions_B), labels_B
        row += len(labels_B)
        beat()
