"""Features of whole splits: the inputs of heads, for stages whose trunk and features do not move.

Shapes: e experts held here, B images of one replica, N images of a split, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from experts.batches import Replica
from experts.data.images import ImageStore
from experts.eval_batches import EvalBatches
from orchestration.training.precision import casting
from orchestration.training.stage_setup import StageSetup, TrainingSetup


class FeaturePasses:
    """Passes over a replica's share of a split. The first one keeps what it finds if dataset.resident_mib allows.

    Args:
        setup: of the stage; its network must be in evaluation mode.
        store: images of the split.
        beat: called after every batch.
        replica: whose share; by default the worker's own.
        keep: whether to keep anything.
    """

    def __init__(
        self,
        setup: StageSetup,
        store: ImageStore,
        beat: Callable[[], None],
        replica: Replica | None = None,
        *,
        keep: bool = True,
    ) -> None:
        self._setup, self._beat = setup, beat
        self._batches = EvalBatches(store, setup.dataset.config, setup.scored_at_once, replica or setup.replica)
        self._kept: list[tuple[list[Tensor], Tensor]] | None = None
        self._too_many = not keep  # or a pass has found more than it may keep

    def of(self, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features [B, D] of one expert held here, and labels [B]."""
        if not self._too_many:
            yield from ((features[place], labels_B) for features, labels_B in self.all())
            return
        model = self._setup.model  # the other experts' features would be thrown away
        for images_B3HW, labels_B in self._batches:
            with casting(self._setup.config.engine, self._setup.mesh.device):
                features_BD = model.members()[place].features(model.trunk(images_B3HW))
            self._beat()
            yield features_BD, labels_B

    def all(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield features, one [B, D] for each expert held here, and labels [B]."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[list[Tensor], Tensor]] = []
        held, limit = 0, _limit(self._setup)
        for images_B3HW, labels_B in self._batches:
            with casting(self._setup.config.engine, self._setup.mesh.device):
                features = self._setup.model.features(images_B3HW)
            held += sum(f.nbytes for f in features)
            if held > limit:
                self._too_many = True
                kept.clear()
            if not self._too_many:
                kept.append((features, labels_B))
            self._beat()
            yield features, labels_B
        if not self._too_many:
            self._kept = kept


def _limit(setup: StageSetup) -> int:
    """Return the bytes that a split's features may take."""
    return setup.config.dataset.resident_mib * 2**20


def features_are_kept(setup: TrainingSetup, width: int) -> bool:
    """Say whether `training_features` will return them, if an expert has so many features."""
    number_bytes = 2 if setup.config.engine.precision == "autocast" else setup.dtype.itemsize
    held = len(setup.dataset.train) * len(setup.model.experts) * width * number_bytes
    return setup.features_are_fixed and held <= _limit(setup)


@torch.no_grad()
def training_features(setup: TrainingSetup, beat: Callable[[], None]) -> list[Tensor] | None:
    """Compute what the heads see of every training image, once for the whole stage.

    Args:
        setup: of a stage that trains heads alone, with its weights loaded.
        beat: called after every batch.

    Returns:
        [N, D] for each expert held here; None where features change from step to step, or take more than
        dataset.resident_mib.
    """
    if not setup.features_are_fixed:
        return None
    was_training = setup.model.training
    setup.model.eval()
    # Every replica needs all images: which of them are its own changes from epoch to epoch.
    whole = Replica(device=setup.replica.device, dtype=setup.replica.dtype)
    tables: list[Tensor] = []
    number, done = len(setup.dataset.train), 0
    for features, _ in FeaturePasses(setup, setup.batches.store, beat, whole, keep=False).all():
        if not tables:
            # Decided by the first batch, and written in place: joined parts would take the memory twice.
            if number * sum(f[0].nbytes for f in features) > _limit(setup):
                break
            tables = [f.new_empty(number, *f.shape[1:]) for f in features]
        for table, found in zip(tables, features, strict=True):
            table[done : done + len(found)] = found
        done += len(features[0])
    setup.model.train(was_training)
    return tables or None
