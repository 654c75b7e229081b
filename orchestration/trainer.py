"""One worker's part of one stage: its experts, its share of every batch, its files. Knows nothing of Ray.

A batch, on every worker: the replica's images go through the trunk and the worker's own experts; logits of all
experts are gathered over the expert axis, other workers' detached; the objective is evaluated whole, as this replica's
share of the global batch; the engine sums gradients over the mesh and moves the weights.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aggregation.metrics import Scores
from experts.data.batches import Batch, EvalBatches, TrainBatches
from experts.data.dataset import Dataset
from experts.ensemble import Ensemble, build_ensemble
from experts.progress import Progress
from experts.registry import build
from orchestration.checkpoint import FileEntry, read_tensors, write_tensors
from orchestration.config import RunConfig
from orchestration.engine import Engine, NonFiniteGradient, TorchEngine, casting
from orchestration.mesh import Mesh


class TrainingDiverged(FloatingPointError):
    """The loss or a gradient is not finite. The run ends here; its newest checkpoint is from before."""


@dataclass
class Interval:
    """What some consecutive steps of one epoch gave. The same on every worker, but for `seconds`.

    Attributes:
        losses: the ensemble's loss of each step, nats.
        terms: terms of the last step, by name.
        lr: learning rate of the last step.
        images: of the global batches.
        seconds: spent in these steps.
        epoch_means: when the epoch ended: mean per image of the loss and of each term; else empty.
    """

    losses: list[float] = field(default_factory=list)
    terms: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0
    images: int = 0
    seconds: float = 0.0
    epoch_means: dict[str, float] = field(default_factory=dict)


class StageTrainer:
    """Trains one worker's experts through one stage.

    Args:
        config: of the run.
        stage: name of the stage.
        dataset: opened.
        mesh: this worker's place. A world must have been joined where the mesh has several workers, and always for the
            deepspeed engine.
    """

    def __init__(self, config: RunConfig, stage: str, dataset: Dataset, mesh: Mesh) -> None:
        self.config, self.dataset, self.mesh = config, dataset, mesh
        self.stage_name, self.stage = stage, config.method.stages[stage]
        precision = config.engine.precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.beat = time.monotonic()

        self.model = self._build_model()
        counts_C = torch.from_numpy(dataset.counts_C)
        self.objective = build("objective", self.stage.objective, counts_C, config.method.num_experts)
        self.objective.to(mesh.device, self.dtype)
        self.schedule = build("lr_schedule", self.stage.lr_schedule)
        self.aggregator = build("aggregator", config.method.aggregator)
        self.engine: Engine = self._build_engine()
        self.batches = self._build_batches()
        self.done = 0
        self._sums: dict[str, float] = {}
        self._upcoming: Iterator[Batch] | None = None

    # Building

    def _build_model(self) -> Ensemble:
        method = self.config.method
        model = build_ensemble(
            self.config.backbone,
            method.head,
            num_classes=self.dataset.num_classes,
            expert_names=method.expert_names,
            reduce_dimension=method.reduce_dimension,
            seed=self.config.seed,
            only=[method.expert_names[i] for i in self.mesh.own_experts],
        ).to(self.mesh.device, self.dtype)
        if self.config.engine.sync_batchnorm:
            self.mesh.synchronise_batchnorm(model)
        return model.train()

    def _build_engine(self) -> Engine:
        args = (self.model, self.mesh, self.stage.optimizer, self.config.engine)
        if self.config.engine.name == "torch":
            return TorchEngine(*args)
        from orchestration.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(*args)

    def _build_batches(self) -> TrainBatches:
        train = self.dataset.train
        sampler = build("sampler", self.stage.sampler, train.labels, self.dataset.num_classes)
        return TrainBatches(
            train,
            sampler,
            self.dataset.config,
            batch_size=self.stage.batch_size,
            seed=self.config.seed,
            stage=self.stage_name,
            stream="all",
            epochs=self.stage.epochs,
            device=self.mesh.device,
            dtype=self.dtype,
            replica=self.mesh.replica,
            num_replicas=self.mesh.shape.replicas,
            drop_last=self.stage.drop_last,
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.stage.epochs * self.steps_per_epoch

    def progress(self, done: int) -> Progress:
        """Where training stands when `done` steps are."""
        epoch, step = divmod(done, self.steps_per_epoch)
        return Progress(epoch + 1, self.stage.epochs, step, self.steps_per_epoch)

    # Training

    def train(self, until: int) -> Interval:
        """Take steps until `until` of the stage are done; never beyond the end of the epoch.

        Raises:
            TrainingDiverged: on every worker; names stage, epoch, step and what is not finite.
        """
        now = self.progress(self.done)
        last = now.step + until - self.done
        assert now.step < last <= self.steps_per_epoch, (until, self.done, self.steps_per_epoch)
        if self._upcoming is None:  # kept between intervals, so that files are decoded ahead of them
            self._upcoming = self.batches.iterate(now.epoch, now.step)
        interval = Interval()
        start = time.monotonic()
        for batch in itertools.islice(self._upcoming, until - self.done):
            self._step(batch, self.progress(self.done), interval)
            self.done += 1
            self.beat = time.monotonic()
        interval.seconds = time.monotonic() - start
        if self.done % self.steps_per_epoch == 0:
            images = self._sums.pop("images")
            interval.epoch_means = {name: total / images for name, total in self._sums.items()}
            self._sums = {}
            self._upcoming = None
        return interval

    def _step(self, batch: Batch, now: Progress, interval: Interval) -> None:
        lr = self.stage.optimizer.lr * self.schedule.factor(now)
        self.model.train()
        logits_eBC = self.engine.forward(batch.images_B3HW)
        logits_EBC = self.mesh.gather_logits(logits_eBC)
        denominators = self.objective.denominators(batch.global_labels, now)
        loss, terms = self.objective(logits_EBC, batch.labels_B, denominators, now)
        values = self._global_values(loss, terms)
        if not np.isfinite(values["loss"]):
            raise TrainingDiverged(self._blame(logits_EBC, now))
        try:
            self.engine.step(loss, lr)
        except NonFiniteGradient as problem:
            raise TrainingDiverged(f"{self._place(now)}: {problem}; {_ADVICE}") from problem
        images = len(batch.global_labels)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * images
        self._sums["images"] = self._sums.get("images", 0.0) + images
        interval.losses.append(values.pop("loss"))
        interval.terms, interval.lr, interval.images = values, lr, interval.images + images

    def _global_values(self, loss: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
        """Loss and terms over the global batch; terms per expert get the expert's name."""
        names, values = ["loss"], [loss.detach().reshape(1)]
        for term, value in terms.items():
            experts = self.config.method.expert_names if value.ndim else ()
            names += [f"{term}/{expert}" for expert in experts] or [term]
            values.append(value.detach().reshape(-1))
        total = self.mesh.sum_over_data(torch.cat([v.double() for v in values]))
        return dict(zip(names, total.tolist(), strict=True))

    def _place(self, now: Progress) -> str:
        return f"stage {self.stage_name}, epoch {now.epoch}, step {self.done + 1}"

    def _blame(self, logits_EBC: Tensor, now: Progress) -> str:
        bad_E = (~torch.isfinite(logits_EBC)).flatten(1).any(1).double()
        self.mesh.sum_over_data(bad_E)  # the images may be another replica's
        bad = [name for name, count in zip(self.config.method.expert_names, bad_E.tolist(), strict=True) if count]
        whose = f"logits of {', '.join(bad)}" if bad else "the objective, from finite logits"
        return f"{self._place(now)}: the loss is not finite; found in {whose}; needed finite numbers; {_ADVICE}"

    # Evaluation

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, np.ndarray] | None:
        """Score this replica's share of a split ("test" or "val").

        Every worker takes part; the first slot's return the state of `Scores`, the others None.
        """
        store = self.dataset.test if split == "test" else self.dataset.val
        assert store is not None, split
        if not self.config.engine.sync_batchnorm:
            self.mesh.broadcast_buffers(self.model)
        batches = EvalBatches(
            store,
            self.dataset.config,
            self.config.run.evaluation_batch_size,
            device=self.mesh.device,
            dtype=self.dtype,
            replica=self.mesh.replica,
            num_replicas=self.mesh.shape.replicas,
        )
        self.model.eval()
        scores = Scores()
        for images_B3HW, labels_B in batches:
            with casting(self.config.engine, self.mesh.device):
                logits_eBC = self.model(images_B3HW)
            logits_EBC = self.mesh.gather_logits(logits_eBC)
            if self.mesh.slot == 0:
                members = dict(zip(self.config.method.expert_names, logits_EBC.unbind(), strict=True))
                scores.update({"ensemble": self.aggregator(logits_EBC), **members}, labels_B)
            self.beat = time.monotonic()
        return scores.state() if self.mesh.slot == 0 else None

    # Checkpoints

    def save(self, folder: str) -> list[FileEntry]:
        """Write this worker's files to a folder that exists; every worker must take part."""
        if not self.config.engine.sync_batchnorm:
            self.mesh.broadcast_buffers(self.model)
        momentum = self.engine.momentum()
        if self.mesh.replica:
            return []
        entries = []
        for file, prefix in self._files():
            weights = {k: v.cpu() for k, v in self.model.state_dict().items() if k.startswith(prefix)}
            entries.append(write_tensors(Path(folder), file, weights))
            moving = {k: v for k, v in momentum.items() if k.startswith(prefix)}
            if moving:
                entries.append(write_tensors(Path(folder), f"{file}.momentum", moving))
            self.beat = time.monotonic()
        return entries

    def _files(self) -> list[tuple[str, str]]:
        """File names this worker writes, with the prefix of their parameters."""
        own = [(name, f"experts.{name}.") for name in self.model.names]
        return [("trunk", "trunk."), *own] if self.mesh.slot == 0 else own

    def load(self, folder: str, state: dict[str, Any]) -> None:
        """Go on from a complete checkpoint."""
        names = ["trunk", *self.model.names]
        weights: dict[str, Tensor] = {}
        momentum: dict[str, Tensor] = {}
        for name in names:
            weights |= read_tensors(Path(folder), name)
            momentum |= read_tensors(Path(folder), f"{name}.momentum")
        self.model.load_state_dict(weights)
        self.engine.restore(momentum)
        self.done = state["step"]
        self._sums = dict(state["sums"])
        self._upcoming = None

    def start_from(self, folder: str) -> None:
        """Begin this stage with the weights of a checkpoint, its momentum left behind."""
        weights: dict[str, Tensor] = {}
        for name in ["trunk", *self.model.names]:
            weights |= read_tensors(Path(folder), name)
        self.model.load_state_dict(weights)
        self.engine.restore({})

    def state(self) -> dict[str, Any]:
        """Counters for a checkpoint; the same on every worker."""
        return {"step": self.done, "sums": self._sums}

    def close(self) -> None:
        """Let go of loader processes and engine buffers."""
        self._upcoming = None
        self.batches.close()
        self.engine.close()


_ADVICE = (
    "lower method.stages.<stage>.optimizer.lr or lengthen its warm-up, and look at the last train/loss values in "
    "metrics.jsonl; the newest checkpoint is from before"
)
