"""One worker's part of one stage: its experts, its share of every batch, its files. Knows nothing of Ray.

One step, on every worker of the mesh at the same time (step.py):

    images, labels = this replica's share of the global batch        # TrainBatches: the same images on every slot
    features = trunk(images)                                         # the stage's flow, through the engine
    own = [expert(features) for expert in the worker's own experts]
    outputs = gather(own)                                            # [E, B, X]; other slots' experts come detached
    given = teachers(images)                                         # frozen; their experts live on all slots too
    loss, terms = objective(outputs, labels, given) / denominators of the global batch
    gradients = d loss / d leaves, summed over every worker that holds the leaf       # leaves.py
    ok = ok and the sum of the losses and all gradients are finite
    weights -= SGD(gradients, schedule(now)) where ok                # engine.py, deepspeed_engine.py

The host waits for none of it. After an interval of steps it reads their losses, and stops if one was not ok.

The loss is evaluated whole on every worker, as its replica's share of the global batch; only the worker's own experts
carry gradients. So no feature or activation crosses the network, and any placement gives the same numbers.

Before the first step of an epoch, auxiliaries may pass over all training images (before_epoch.py).

stage_setup.py builds what a stage needs, evaluation.py scores a split, fitting.py is all that a stage without steps
does, stage_files.py saves and loads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from aggregation.predictions import Predictions
from experts.batches import Batch
from experts.data.dataset import Dataset
from orchestration.config.run_config import RunConfig
from orchestration.storage.checkpoint import FileEntry
from orchestration.training import evaluation, fitting, stage_files
from orchestration.training.before_epoch import before_epoch
from orchestration.training.compiling import compile_parts
from orchestration.training.features import training_features
from orchestration.training.mesh import Mesh
from orchestration.training.precision import use_precision
from orchestration.training.stage_setup import StageSetup, TrainingSetup
from orchestration.training.step import Row, TrainingDiverged, TrainingStep, problem, read


@dataclass
class Interval:
    """Some consecutive steps of one epoch. The same on every worker, but for `seconds` and `notes`.

    Attributes:
        losses: the ensemble's loss at each step, nats.
        terms: terms of the last step, by name.
        lr: learning rate of the last step.
        images: number of images in the global batches.
        seconds: duration of these steps.
        epoch_means: mean per image of the loss and of each term, if the epoch ended; else empty.
        notes: sentences for the operator to read.
    """

    losses: list[float] = field(default_factory=list)
    terms: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0
    images: int = 0
    seconds: float = 0.0
    epoch_means: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class StageTrainer:
    """Trains one worker's experts through one stage.

    Args: as `TrainingSetup`.

    Attributes:
        setup: data, network and aggregator of the stage.
        training: objective, flow, engine and batches too; None in a stage without steps.
        snapshot: the copy that the newest checkpoint is written from.
        fitted: what a stage without steps chose, as `fitting.fit` returns it.
        done: optimiser steps taken.
        beat: time of the last sign of life, by `time.monotonic`; the driver finds hanging workers by it.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        dataset: Dataset,
        mesh: Mesh,
        teacher_folders: Mapping[str, str] | None = None,
    ) -> None:
        self.beat = time.monotonic()
        self.training: TrainingSetup | None = None
        self._notes: list[str] = []
        if config.method.stages[stage].epochs:
            self.training = TrainingSetup(config, stage, dataset, mesh, teacher_folders)
            if config.engine.compile:
                compile_parts(self.training, self._alive)
            self._step = TrainingStep(self.training, self._notes.append)
        self.setup = self.training or StageSetup(config, stage, dataset, mesh)
        self.snapshot = stage_files.Snapshot()
        self.done = 0
        self.fitted: fitting.Fitted = {}
        self._features: list[Tensor] | None = None
        self._features_asked = False
        self._heads_came = False
        self._sums: dict[str, float] = {}  # over the epoch: number of images, and values times images
        self._upcoming: Iterator[Batch] | None = None

    # Training

    def train(self, until: int) -> Interval:
        """Take steps until `until` steps of the stage are done; never beyond the end of the epoch.

        Raises:
            TrainingDiverged: names stage, epoch, step and what was not finite. Every worker raises it for a loss, those
                that hold the parameter for a gradient. No weight has moved since.
        """
        assert self.training is not None, "a stage without steps"
        use_precision(self.setup.config.engine, self.setup.mesh.device)
        steps_per_epoch = self.setup.steps_per_epoch
        now = self.training.progress(self.done)
        last = now.step + until - self.done
        assert now.step < last <= steps_per_epoch, (until, self.done, steps_per_epoch)
        if self._upcoming is None:  # kept between intervals, so that files of the next one are decoded ahead
            self._upcoming = self._batches_of(self.training, now.epoch, now.step)

        rows: list[Row] = []
        start = time.monotonic()
        if now.step == 0:
            before_epoch(self.training, now, self._alive)
        for batch in itertools.islice(self._upcoming, until - self.done):
            rows.append(self._step(batch, self.training.progress(self.done)))
            self.done += 1
            self._alive()
        interval = self._read(self.training, rows)
        interval.seconds = time.monotonic() - start
        interval.notes, self._notes[:] = self._notes[:], []
        if self.done % steps_per_epoch == 0 and interval.images:
            self._end_epoch(interval)
        return interval

    def _batches_of(self, setup: TrainingSetup, epoch: int, first_step: int) -> Iterator[Batch]:
        """Return the rest of an epoch's batches, each with its partner if the stage pairs them."""
        if not self._features_asked:  # not earlier: the weights were not loaded yet
            self._features, self._features_asked = training_features(setup, self._alive), True
        streams = [setup.batches] if setup.partners is None else [setup.batches, setup.partners]
        if self._features is not None:
            batches = [stream.of_features(self._features, epoch, first_step) for stream in streams]
        else:
            batches = [stream.iterate(epoch, first_step) for stream in streams]
        if setup.partners is None:
            return batches[0]
        return (replace(batch, partner=partner) for batch, partner in zip(*batches, strict=True))

    def _read(self, setup: TrainingSetup, rows: list[Row]) -> Interval:
        """Wait for some steps, and return what they were.

        Raises:
            TrainingDiverged: something was not finite.
        """
        interval = Interval()
        for row, numbers in zip(rows, read(rows), strict=True):
            if not numbers[-1]:  # nothing has moved since; a worker that did not find it says nothing
                if (found := problem(setup, row, numbers)) is not None:
                    before = ", ".join(f"{loss:.4g}" for loss in interval.losses[-3:]) or "none since the last report"
                    raise TrainingDiverged(f"{found}; losses before it: {before}")
                break
            self._record(interval, row, dict(zip(row.names, numbers, strict=False)))
        self._alive()
        return interval

    def _record(self, interval: Interval, row: Row, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * row.images
        self._sums["images"] = self._sums.get("images", 0.0) + row.images
        interval.losses.append(values.pop("loss"))  # after the sums, which need it
        interval.terms, interval.lr, interval.images = values, row.lr, interval.images + row.images

    def _end_epoch(self, interval: Interval) -> None:
        images = self._sums.pop("images")
        interval.epoch_means = {name: total / images for name, total in self._sums.items()}
        self._sums = {}
        self._upcoming = None

    def prepare(self) -> None:
        """Let the objective see the data before the first step of a stage, and fit heads that ask for it."""
        assert self.training is not None
        use_precision(self.setup.config.engine, self.setup.mesh.device)
        evaluation.prepare_objective(self.training, self._alive)
        if self.setup.config.method.fits_head_first(self.setup.stage_name) and not self._heads_came:
            fitting.fit_before_steps(self.training, self._alive)

    def observe(self, per_class: list[float | None]) -> None:
        """Tell the objective the ensemble's top-1 per class on the validation split; most objectives ignore it."""
        assert self.training is not None
        self.training.objective.observe(per_class)

    def fit(self) -> fitting.Fitted:
        """Fit heads and choose open numbers, all that a stage without steps does. See `fitting.fit`."""
        use_precision(self.setup.config.engine, self.setup.mesh.device)
        self.fitted = fitting.fit(self.setup, self._alive)
        return self.fitted

    # Evaluation

    def evaluate(self, split: str) -> evaluation.States | None:
        """Score a split; see `evaluation.evaluate`."""
        use_precision(self.setup.config.engine, self.setup.mesh.device)
        return evaluation.evaluate(self.setup, split, self._alive)

    def predict(self, split: str, *, logits: bool) -> Predictions | None:
        """Return what the ensemble and its experts say of a split; see `evaluation.predict`."""
        use_precision(self.setup.config.engine, self.setup.mesh.device)
        return evaluation.predict(self.setup, split, self._alive, logits=logits)

    # Checkpoints

    def save(self, folder: str) -> list[FileEntry]:
        """Write this worker's files to a folder that exists; every worker must take part. See `stage_files.save`."""
        return stage_files.save(self.setup, Path(folder), self._alive)

    def take_snapshot(self) -> dict[str, Any]:
        """Copy what a checkpoint holds, for `snapshot` to write, and return `state`; every worker must take part."""
        self.snapshot.take(self.setup)
        return self.state()

    def write_snapshot(self, folder: str) -> list[FileEntry]:
        """Write the newest copy to a folder that exists. Another thread may call it while this one trains."""
        return self.snapshot.write(Path(folder), self._alive)

    def state(self) -> dict[str, Any]:
        """Return the counters of a checkpoint; the same on every worker."""
        fitted = {"fitted": self.fitted} if self.fitted else {}
        return {"step": self.done, "sums": dict(self._sums), **fitted}

    def load(self, folder: str, state: dict[str, Any]) -> None:
        """Continue from a complete checkpoint, with the `state` that was saved with it."""
        stage_files.load(self.setup, Path(folder))
        self._features_asked = False
        self.done = state["step"]
        self._sums = dict(state["sums"])
        self.fitted = state.get("fitted", {})  # checkpoints of earlier versions have none
        fitting.apply(self.setup, self.fitted)
        self._upcoming = None

    def start_from(self, folder: str) -> None:
        """Begin this stage with the weights of another stage's checkpoint, without its momentum."""
        stage_files.start_from(self.setup, Path(folder))

    def load_weights(self, folder: str) -> None:
        """Load the weights of a checkpoint of this stage, to score with; no step may follow."""
        stage_files.load_weights(self.setup, Path(folder))

    def start_from_model(self, folder: str) -> None:
        """Begin this stage with a model that another run exported; see `stage_files.start_from_model`."""
        self._heads_came = stage_files.start_from_model(self.setup, Path(folder))

    def close(self) -> None:
        """Stop loader processes and free captured steps and the engine's buffers."""
        self._upcoming = None
        if self.training is not None:
            self._step.close()
        self.setup.close()

    def _alive(self) -> None:
        self.beat = time.monotonic()
