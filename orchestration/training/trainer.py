"""One worker's part of one stage: its experts, its share of every batch, its files. Knows nothing of Ray.

A batch, on every worker: the stage's flow takes the replica's images through the trunk and the worker's own experts;
outputs of all experts are gathered over the expert axis, other workers' detached; the objective is evaluated whole, as
this replica's share of the global batch; the engine sums gradients over the mesh and moves the weights.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aggregation.aggregator import Aggregator, Outputs
from aggregation.diversity import Diversity
from aggregation.metrics import Scores
from aggregation.serving import load_model
from experts.class_groups import split_classes
from experts.data.batches import Batch, EvalBatches, TrainBatches
from experts.data.dataset import Dataset
from experts.data.keyed_random import key
from experts.ensemble import Ensemble, build_ensemble, freeze, part_of
from experts.flow import Flow
from experts.objective import Given, Objective
from experts.progress import Progress
from experts.registry import build
from orchestration.config.recipe import StageConfig
from orchestration.config.run_config import RunConfig
from orchestration.storage.checkpoint import FileEntry, read_tensors, write_tensors
from orchestration.storage.pretrained import load_pretrained
from orchestration.training.engine import Engine, NonFiniteGradient, TorchEngine, casting
from orchestration.training.mesh import Mesh
from orchestration.training.teachers import Teachers, check_teacher


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

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        dataset: Dataset,
        mesh: Mesh,
        teacher_folders: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.mesh = config, mesh
        self.stage_name, self.stage = stage, config.method.stages[stage]
        self.dataset = stage_dataset(self.stage, dataset)
        self.expert_names = config.method.names_in(stage)
        precision = config.engine.precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.beat = time.monotonic()

        counts_C = torch.from_numpy(self.dataset.counts_C)
        num_experts = len(self.expert_names)
        self.objective: Objective = build("objective", self.stage.objective, counts_C, num_experts)
        self.objective.to(mesh.device, self.dtype)
        draws = partial(key, config.seed, stage)
        self.flow: Flow = build("flow", self.stage.flow, self.objective, self.expert_names, draws)
        self.distillation = self.stage.distillation and build("distillation", self.stage.distillation)
        self.model = self._build_model()
        self._frozen = freeze(self.model, self.flow.learns - set(self.stage.freeze))
        self.schedule = build("lr_schedule", self.stage.lr_schedule)
        self.aggregator: Aggregator = build(
            "aggregator", config.method.aggregator_in(stage), counts_C, self.expert_names
        )
        self.teachers = Teachers(self.stage.teachers, teacher_folders or {}, dataset, mesh, self.dtype)
        self.engine: Engine = self._build_engine()
        self.batches = self._build_batches(self.stage.sampler, "all")
        self.partners = None
        if self.stage.partner_sampler is not None:
            self.partners = self._build_batches(self.stage.partner_sampler, "partner")
            if self.partners.draws_per_epoch != self.batches.draws_per_epoch:
                raise ValueError(
                    f"stages.{stage}: sampler draws {self.batches.draws_per_epoch} images an epoch, partner_sampler "
                    f"{self.partners.draws_per_epoch}; needed as many, since batches are paired by row; choose "
                    f"samplers of equal length"
                )
        self.done = 0
        self._sums: dict[str, float] = {}
        self._upcoming: Iterator[Batch] | None = None

    # Building

    def _build_model(self) -> Ensemble:
        method = self.config.method
        model = build_ensemble(
            self.config.ensemble(self.expert_names, self.dataset.num_classes),
            seed=self.config.seed,
            only=[self.expert_names[i] for i in self.mesh.own_experts],
        )
        if method.backbone_weights is not None and method.starts_from(self.stage_name) is None:
            load_pretrained(model, method.backbone_weights)
        model.to(self.mesh.device, self.dtype)
        if self.config.engine.sync_batchnorm:
            self.mesh.synchronise_batchnorm(model)
        return model.train()

    def _build_engine(self) -> Engine:
        factors = dict(zip(self.expert_names, self.objective.lr_factors, strict=True))
        parts = self.stage.lr_factors.model_dump()
        args = (self.model, self.mesh, self.stage.optimizer, self.config.engine, factors, parts)
        if self.config.engine.name == "torch":
            return TorchEngine(*args)
        from orchestration.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(*args)

    def _build_batches(self, sampler: Any, stream: str) -> TrainBatches:
        train = self.dataset.train
        return TrainBatches(
            train,
            build("sampler", sampler, train.labels, self.dataset.num_classes),
            self.dataset.config,
            batch_size=self.stage.batch_size,
            seed=self.config.seed,
            stage=self.stage_name,
            stream=stream,
            epochs=self.stage.epochs,
            device=self.mesh.device,
            dtype=self.dtype,
            replica=self.mesh.replica,
            num_replicas=self.mesh.shape.replicas,
            drop_last=self.stage.drop_last,
            mixup_alpha=self.stage.mixup.alpha if self.stage.mixup else None,
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
            self._upcoming = self._batches_of(now.epoch, now.step)
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

    def _batches_of(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """The rest of an epoch, every batch with its partner if it needs one."""
        batches = self.batches.iterate(epoch, first_step)
        if self.partners is None:
            return batches
        partners = self.partners.iterate(epoch, first_step)
        return (replace(batch, partner=partner) for batch, partner in zip(batches, partners, strict=True))

    def _step(self, batch: Batch, now: Progress, interval: Interval) -> None:
        lr = self.stage.optimizer.lr * self.schedule.factor(now)
        self._set_mode()
        before = self.mesh.statistics_before(self.model.trunk) if self.flow.own_streams else []
        outputs_EBX = self.flow(self.engine, batch, now, self.mesh.gather)
        loss, terms = self._loss(outputs_EBX, batch, now)
        values = self._global_values(loss, terms)
        if not np.isfinite(values["loss"]):
            raise TrainingDiverged(self._blame(outputs_EBX, now))
        try:
            self.engine.step(loss, lr)
        except NonFiniteGradient as problem:
            raise TrainingDiverged(f"{self._place(now)}: {problem}; {_ADVICE}") from problem
        if self.flow.own_streams:  # trunks that live apart saw different images; one trunk would have seen them in turn
            self.mesh.statistics_in_turn(self.model.trunk, before)
        images = len(batch.global_labels)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * images
        self._sums["images"] = self._sums.get("images", 0.0) + images
        interval.losses.append(values.pop("loss"))
        interval.terms, interval.lr, interval.images = values, lr, interval.images + images

    def _set_mode(self) -> None:
        self.model.train()
        if self.stage.frozen_batchnorm == "eval":
            for module in self._frozen:
                module.eval()

    def _loss(self, outputs_EBX: Tensor, batch: Batch, now: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """This replica's share of the loss, of the labels and, with mixup, of the labels blended in."""
        given = Given(self.teachers(batch.images_B3HW) if self.teachers else {}, batch.positions_B)
        parts = [(1.0, *self.flow.labels(batch))]
        if batch.mixed is not None:
            rest = 1 - batch.mixed.share
            parts = [(batch.mixed.share, *parts[0][1:]), (rest, batch.mixed.labels_B, batch.mixed.global_labels)]
        total, terms = outputs_EBX.new_zeros(()), dict[str, Tensor]()
        for share, labels, global_labels in parts:
            denominators = self.objective.denominators(global_labels, now)
            loss, found = self.objective(outputs_EBX, labels, denominators, now, given)
            total = total + share * loss
            terms = {name: share * value + terms.get(name, 0.0) for name, value in found.items()}
        if self.distillation is not None:
            denominators = self.distillation.denominators(batch.global_labels)
            total, found = self.distillation(total, outputs_EBX, given.teachers, denominators, now)
            terms |= found
        return total, terms

    def _global_values(self, loss: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
        """Loss and terms over the global batch; terms per expert get the expert's name."""
        names, values = ["loss"], [loss.detach().reshape(1)]
        for term, value in terms.items():
            experts = self.expert_names if value.ndim else ()
            names += [f"{term}/{expert}" for expert in experts] or [term]
            values.append(value.detach().reshape(-1))
        total = self.mesh.sum_over_data(torch.cat([v.double() for v in values]))
        return dict(zip(names, total.tolist(), strict=True))

    def _place(self, now: Progress) -> str:
        return f"stage {self.stage_name}, epoch {now.epoch}, step {self.done + 1}"

    def _blame(self, outputs_EBX: Tensor, now: Progress) -> str:
        bad_E = (~torch.isfinite(outputs_EBX)).flatten(1).any(1).double()
        self.mesh.sum_over_data(bad_E)  # the images may be another replica's
        bad = [name for name, count in zip(self.expert_names, bad_E.tolist(), strict=True) if count]
        whose = f"logits of {', '.join(bad)}" if bad else "the objective, from finite logits"
        return f"{self._place(now)}: the loss is not finite; found in {whose}; needed finite numbers; {_ADVICE}"

    # Evaluation

    @torch.no_grad()
    def evaluate(self, split: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
        """Score this replica's share of a split ("test" or "val").

        Every worker takes part; the first slot's return the states of `Scores` and `Diversity`, the others None.
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
        numbers_EK = self.mesh.gather(torch.stack([self.aggregator.describe(e) for e in self.model.experts.values()]))
        scores, diversity = Scores(), Diversity()
        for images_B3HW, labels_B in batches:
            with casting(self.config.engine, self.mesh.device):
                logits_EBC, gates_EB = self.model.outputs(images_B3HW, self.mesh.gather)
            if self.mesh.slot == 0:
                outputs = Outputs(logits_EBC, numbers_EK, gates_EB)
                members = dict(zip(self.expert_names, logits_EBC.unbind(), strict=True))
                used = self.aggregator.experts_used(outputs)
                per_image = None if used is None else {"experts_used": used}
                scores.update({**self.aggregator.members(outputs), **members}, labels_B, per_image)
                diversity.update(members, labels_B)
            self.beat = time.monotonic()
        return (scores.state(), diversity.state()) if self.mesh.slot == 0 else None

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
            if weights:
                entries.append(write_tensors(Path(folder), file, weights))
            moving = {k: v for k, v in momentum.items() if k.startswith(prefix)}
            if moving:
                entries.append(write_tensors(Path(folder), f"{file}.momentum", moving))
            self.beat = time.monotonic()
        if self.mesh.slot == 0 and (state := self.objective.state_dict()):
            entries.append(write_tensors(Path(folder), "objective", {k: v.cpu() for k, v in state.items()}))
        return entries

    def _files(self) -> list[tuple[str, str]]:
        """File names this worker writes, with the prefix of their parameters."""
        own = [(name, f"experts.{name}.") for name in self.model.names]
        return [("trunk", "trunk."), ("shared", "shared."), *own] if self.mesh.slot == 0 else own

    def load(self, folder: str, state: dict[str, Any]) -> None:
        """Go on from a complete checkpoint."""
        weights: dict[str, Tensor] = {}
        momentum: dict[str, Tensor] = {}
        for name in ["trunk", "shared", *self.model.names]:
            weights |= read_tensors(Path(folder), name)
            momentum |= read_tensors(Path(folder), f"{name}.momentum")
        self.model.load_state_dict(weights)
        self.objective.load_state_dict(read_tensors(Path(folder), "objective"))
        self.engine.restore(momentum)
        self.done = state["step"]
        self._sums = dict(state["sums"])
        self._upcoming = None

    def start_from(self, folder: str) -> None:
        """Begin this stage with the weights of a checkpoint of another stage, its momentum left behind."""
        weights: dict[str, Tensor] = {}
        for name in ["trunk", "shared", *self.model.names]:
            weights |= read_tensors(Path(folder), name)
        self._begin_with(weights, folder)

    def start_from_model(self, folder: str) -> None:
        """Begin this stage with an exported model, of another run.

        Raises:
            ValueError: it was made for other classes or of other parts.
        """
        model = load_model(folder)
        check_teacher("start_from", model, self.dataset, folder)
        self._begin_with(dict(model.ensemble.state_dict()), folder)

    def _begin_with(self, weights: dict[str, Tensor], folder: str) -> None:
        """Load what the weights have of this worker's ensemble; a router that they lack stays new."""
        own = self.model.state_dict()
        missing = [name for name in own if name not in weights and part_of(name) != "gates"]
        odd = [name for name in own if name in weights and own[name].shape != weights[name].shape]
        if missing or odd:
            what = f"{missing[0]} is missing" if missing else f"{odd[0]} is {list(weights[odd[0]].shape)}"
            raise ValueError(
                f"stage {self.stage_name} cannot begin with {folder}: {what} (of {len(missing) + len(odd)} tensors "
                f"that do not fit); needed an ensemble with the same backbone, head, expert names and number of classes"
            )
        self.model.load_state_dict({name: weights.get(name, value) for name, value in own.items()})
        self.engine.restore({})

    def prepare(self) -> None:
        """What an objective needs to see before the first step of a stage; nothing, for most."""
        if self.objective.prepares:
            self.model.eval()
            self.objective.prepare(self._looked_at)
            self.beat = time.monotonic()

    @torch.no_grad()
    def _looked_at(self, split: str) -> Iterator[tuple[Given, Tensor]]:
        """Teachers' scores of a whole split ("train", without chance, or "val"), the same on every worker."""
        store = self.dataset.train_as_evaluated() if split == "train" else self.dataset.val
        if store is None:
            raise ValueError(
                f"objective '{self.stage.objective.name}' needs a validation split, which dataset "
                f"{self.dataset.config.name} has not; set dataset.val_per_class (cut from the training pool) or "
                f"dataset.val_list; the test set is never used for this"
            )
        size, row = self.config.run.evaluation_batch_size, 0
        batches = EvalBatches(store, self.dataset.config, size, device=self.mesh.device, dtype=self.dtype)
        for images_B3HW, labels_B in batches:
            positions_B = torch.arange(row, row + len(labels_B), device=self.mesh.device)
            yield Given(self.teachers(images_B3HW), positions_B), labels_B
            row += len(labels_B)
            self.beat = time.monotonic()

    def observe(self, per_class: list[float | None]) -> None:
        """Tell the objective how the ensemble does on the validation split, top-1 by class; most do not ask."""
        self.objective.observe(per_class)

    def state(self) -> dict[str, Any]:
        """Counters for a checkpoint; the same on every worker."""
        return {"step": self.done, "sums": self._sums}

    def close(self) -> None:
        """Let go of loader processes and engine buffers."""
        self._upcoming = None
        self.batches.close()
        if self.partners is not None:
            self.partners.close()
        self.engine.close()


def stage_dataset(stage: StageConfig, dataset: Dataset) -> Dataset:
    """What a stage sees of the run's data.

    Raises:
        ValueError: a group of classes is empty.
    """
    if stage.classes is None:
        return dataset
    groups = dict(zip(("many", "medium", "few"), split_classes(dataset.counts_C, 3, stage.classes.rule), strict=True))
    return dataset.only(groups[stage.classes.group])


_ADVICE = (
    "lower method.stages.<stage>.optimizer.lr or lengthen its warm-up, and look at the last train/loss values in "
    "metrics.jsonl; the newest checkpoint is from before"
)
