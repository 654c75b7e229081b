"""Lets auxiliaries learn from all training images before an epoch.

    one pass over this replica's share, in evaluation mode and without augmentation
        sums += auxiliary.statistics(features, labels)            # each, of its own expert
    sums over the replicas
    auxiliary.before_epoch(sums)                                  # to its buffers, the same on every replica

A run that resumes at the start of an epoch makes the pass again. One that resumes within it has the saved buffers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts.progress import Progress
from orchestration.training.features import FeaturePasses
from orchestration.training.stage_setup import TrainingSetup


@torch.no_grad()
def before_epoch(setup: TrainingSetup, now: Progress, beat: Callable[[], None]) -> None:
    """Let auxiliaries see all training images, those that want to. Every worker must take part.

    Args:
        setup: of the stage.
        now: the moment of the epoch's first step.
        beat: called after every batch.
    """
    looking = [(k, piece) for k, own in enumerate(setup.auxiliaries.held) for piece in own.values() if piece.looks(now)]
    if not looking:
        return
    setup.model.eval()  # the next step sets the training mode again
    none = torch.zeros(0, dtype=torch.int64, device=setup.mesh.device)
    empty = torch.zeros(0, looking[0][1].num_features, device=setup.mesh.device, dtype=setup.dtype)
    sums = [piece.statistics(empty, none) for _, piece in looking]
    passes = FeaturePasses(setup, setup.dataset.train_as_evaluated(), beat, keep=False)
    for features, labels_B in passes.all():
        found = [piece.statistics(features[place], labels_B) for place, piece in looking]
        sums = [total + more for total, more in zip(sums, found, strict=True)]
    for total, (_, piece) in zip(sums, looking, strict=True):
        setup.mesh.sum_over_data(total, "sums of auxiliaries over the training images")
        piece.before_epoch(total, now)
