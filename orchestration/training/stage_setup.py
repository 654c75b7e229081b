"""Everything that one worker needs for one stage, built from the run's config.

`StageSetup` has data, network and aggregator, which every stage needs; `TrainingSetup` adds objective, flow, teachers,
engine and batches, for stages with steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aggregation.aggregator import Aggregator
from aggregation.serving import ServedModel
from experts.auxiliaries.attached import attach
from experts.batches import Replica, StreamConfig, TrainBatches
from experts.class_groups import split_classes
from experts.data.config import Augment
from experts.data.dataset import Dataset
from experts.data.images import FileImages, ImageStore
from experts.data.keyed_random import key
from experts.data.loader_room import refuse_little_room
from experts.draws import StepDraws
from experts.ensemble import Ensemble, build_ensemble, freeze
from experts.flow import Flow
from experts.mixing.mixing import MixingSettings
from experts.objective import Objective
from experts.progress import Progress
from experts.registry import build
from orchestration.config.recipe import StageConfig
from orchestration.config.recipe_checks import parts_that_learn
from orchestration.config.run_config import RunConfig
from orchestration.storage.pretrained import load_pretrained
from orchestration.training.auxiliaries import StageAuxiliaries
from orchestration.training.engine import Engine, TorchEngine
from orchestration.training.leaves import Leaves
from orchestration.training.mesh import Mesh
from orchestration.training.network import HeldModules
from orchestration.training.precision import memory_format_for
from orchestration.training.teachers import Teachers


class StageSetup:
    """One worker's share of a stage, without what only steps need: data, network, rule that combines experts.

    Args:
        config: of the run.
        stage: name of the stage.
        dataset: the run's data set, opened.
        mesh: this worker's place. It must have joined a torch world if the mesh has several workers.

    Attributes:
        learns: parts of the network that learn in the stage.
        frozen: trunk and features that do not.
        memory_format: of weights with four axes.

    Raises:
        ValueError: a group of classes is empty, or the pretrained weights do not fit.
    """

    def __init__(self, config: RunConfig, stage: str, dataset: Dataset, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.stage_name, self.stage = stage, config.method.stages[stage]
        self.dataset = stage_dataset(self.stage, dataset)
        self.augment = self.stage.augment or self.dataset.config.augment
        self.expert_names = config.method.names_in(stage)
        self.dtype = torch.float64 if config.engine.precision == "float64" else torch.float32
        self.replica = Replica(mesh.replica, mesh.shape.replicas, mesh.device, self.dtype)
        self.counts_C = torch.from_numpy(self.dataset.counts_C)
        self.aggregator: Aggregator = build(
            "aggregator", config.method.aggregator_in(stage), self.counts_C, self.expert_names
        )
        self._scored: dict[str, ImageStore] = {}
        self.learns = parts_that_learn(config.method, stage)
        self.memory_format = memory_format_for(config.engine, mesh.device)
        self.model = self._build_model()
        self.frozen = freeze(self.model, self.learns)

    def _build_model(self) -> Ensemble:
        # The weights of each expert depend on the seed and its name alone, so `only` changes none of them.
        method = self.config.method
        parts = self.config.ensemble(self.stage_name, self.dataset.num_classes)
        model = build_ensemble(
            parts,
            seed=self._seed_of_weights(),
            only=[self.expert_names[i] for i in self.mesh.own_experts],
        )
        if method.backbone_weights is not None and method.starts_from(self.stage_name) is None:
            load_pretrained(model, method.backbone_weights)
        if auxiliaries := self.stage.auxiliaries:
            # After the pretrained weights, which copies of the network begin with.
            attach(model, auxiliaries, parts, self.counts_C, seed=self.config.seed, stage=self.stage_name)
        model.to(self.mesh.device, self.dtype).to(memory_format=self.memory_format)
        if self.config.engine.sync_batchnorm:
            self.mesh.synchronise_batchnorm(model)
        return model.train()

    def _seed_of_weights(self) -> int:
        """Return the seed of new weights: the run's, but another for parts that are made new on features of a source.

        The source's features grew from the weights that its head began with; the same ones again would not be new.
        """
        return key(self.config.seed, self.stage_name, "reinit") if self.stage.reinit else self.config.seed

    @property
    def steps_per_epoch(self) -> int:
        return 0

    @property
    def scored_at_once(self) -> int:
        """The number of images of a batch for scoring."""
        return self.config.evaluation_batch_size(self.mesh.device.type)

    def scored(self, split: str) -> ImageStore:
        """Return the images of "test" or "val". Those in memory are moved to the device at the first call."""
        if split not in self._scored:
            images = self.dataset.test if split == "test" else self.dataset.val
            assert images is not None, split
            self._refuse_little_room([self.scored_at_once] if isinstance(images, FileImages) else [])
            self._scored[split] = images.to(self.mesh.device)
        return self._scored[split]

    def _refuse_little_room(self, streams: list[int]) -> None:
        """See `refuse_little_room`. Of a cluster this worker counts itself alone: it does not know who is beside it."""
        workers = 1 if self.config.cluster.named_address else self.mesh.shape.workers
        refuse_little_room(self.dataset.config, [images for images in streams if images], workers)

    def numbers_of_experts(self) -> Tensor:
        """Return what the aggregator wants to know of every expert's weights, [E, K]. Every worker must take part."""
        own = torch.stack([self.aggregator.describe(expert) for expert in self.model.members()])
        return self.mesh.gather(own, "numbers of the experts")

    def close(self) -> None:
        """Free what the stage holds beside its network."""


class TrainingSetup(StageSetup):
    """One worker's share of a stage with steps: objective, flow, teachers, engine and batches too.

    Args:
        config, stage, dataset, mesh: as `StageSetup`; the deepspeed engine always needs a torch world.
        teachers: exported models of the stage's teachers, or their folders, by name.
        make_engine: class of the engine; by default what the config says.

    Raises:
        ValueError: the stage's two samplers draw different numbers of images, or a teacher does not fit; or as
            `StageSetup`.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        dataset: Dataset,
        mesh: Mesh,
        teachers: Mapping[str, str | ServedModel] | None = None,
        make_engine: type[TorchEngine] | None = None,
    ) -> None:
        super().__init__(config, stage, dataset, mesh)
        assert self.stage.optimizer is not None
        self.optimizer = self.stage.optimizer
        self.objective: Objective = build("objective", self.stage.objective, self.counts_C, len(self.expert_names))
        if self.stage.class_weights is not None:
            self.objective.weigh(self.stage.class_weights, self.counts_C)
        self.objective.to(mesh.device, self.dtype)
        self.draws = partial(key, config.seed, stage)
        self.flow: Flow = build("flow", self.stage.flow, self.objective, self.expert_names, self.draws)
        self.distillation = self.stage.distillation and build("distillation", self.stage.distillation)
        self.schedule = build("lr_schedule", self.stage.lr_schedule)
        self.teachers = Teachers(self.stage.teachers, teachers or {}, dataset, mesh, self.dtype, config.engine)
        # Leaves take the parameters that `freeze` left trainable, in their final type and place.
        expert_factors = dict(zip(self.expert_names, self.objective.lr_factors, strict=True))
        self.leaves = Leaves(
            self.model,
            expert_factors,
            self.stage.lr_factors.model_dump(),
            channels_last=self.memory_format is torch.channels_last,
        )
        self.engine: Engine = self._build_engine(make_engine)
        self.step_draws = StepDraws(self.draws, mesh.device)
        self.auxiliaries = StageAuxiliaries(self.stage.auxiliaries, self.model, mesh, config.engine)
        self.network = HeldModules(
            self.model,
            config.engine,
            mesh.device,
            self.step_draws,
            views=max([1, *(auxiliary.views_together for auxiliary in self.stage.auxiliaries.values())]),
            watched=bool(self.auxiliaries),
            make=self.auxiliaries.made,
        )

        train = self.dataset.train.to(mesh.device)  # once, for both streams
        self.batches = self._build_batches(train, self.stage.sampler, "all", self.stage.mixing, views=self.stage.views)
        self.partners: TrainBatches | None = None
        if self.stage.partner_sampler is not None:
            self.partners = self._build_batches(train, self.stage.partner_sampler, "partner")
            _check_pairing(stage, self.batches, self.partners)
        streams = [stream.read_at_once for stream in (self.batches, self.partners) if stream is not None]
        scored = self.scored_at_once if isinstance(self.dataset.test, FileImages) else 0
        self._refuse_little_room(max([scored], [n for n in streams if n], key=sum))  # now, not after an epoch

    def _build_engine(self, make_engine: type[TorchEngine] | None) -> Engine:
        args = (self.leaves, self.mesh, self.optimizer, self.config.engine)
        if make_engine is not None or self.config.engine.chosen(self.mesh.shape.workers) == "torch":
            return (make_engine or TorchEngine)(*args)
        from orchestration.training.deepspeed_engine import DeepSpeedEngine  # costs seconds, so only where it is used

        return DeepSpeedEngine(*args)

    def _build_batches(
        self,
        train: ImageStore,
        sampler: Any,
        stream: str,
        mixing: MixingSettings | None = None,
        views: Sequence[Augment] = (),
    ) -> TrainBatches:
        assert self.stage.batch_size is not None
        second_sampler = None if mixing is None else mixing.second_sampler
        return TrainBatches(
            train,
            self._build_sampler(sampler, train),
            self.dataset.config.model_copy(update={"augment": self.augment}),
            StreamConfig(
                seed=self.config.seed,
                stage=self.stage_name,
                stream=stream,
                epochs=self.stage.epochs,
                batch_size=self.stage.batch_size,
                drop_last=self.stage.drop_last,
            ),
            self.replica,
            None if mixing is None else build("mixing", mixing, self.dataset.counts_C),
            None if second_sampler is None else self._build_sampler(second_sampler, train),
            views,
        )

    def _build_sampler(self, config: Any, train: ImageStore) -> Any:
        return build("sampler", config, train.labels, self.dataset.num_classes)

    @property
    def prepares(self) -> bool:
        """Whether something must see the data before the first step."""
        return self.stage.objective.prepares or self.config.method.fits_head_first(self.stage_name)

    @property
    def features_are_fixed(self) -> bool:
        """Whether the heads see the same of an image each time it is drawn, so that it can be computed once."""
        moving = self.learns & {"trunk", "features", "attention", "gates"} or self.stage.frozen_batchnorm == "train"
        other = self.stage.mixing is not None or self.stage.teachers or self.stage.views or not self.augment.is_off
        other = other or any(auxiliary.on_trunk for auxiliary in self.stage.auxiliaries.values())
        return self.flow.takes_features and not moving and not other

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    def progress(self, done: int) -> Progress:
        """Return where training stands after `done` steps of the stage."""
        epoch, step = divmod(done, self.steps_per_epoch)
        return Progress(epoch + 1, self.stage.epochs, step, self.steps_per_epoch)

    def close(self) -> None:
        """Stop loader processes and free the engine's buffers."""
        self.batches.close()
        if self.partners is not None:
            self.partners.close()
        self.engine.close()


def stage_dataset(stage: StageConfig, dataset: Dataset) -> Dataset:
    """Return the part of the run's data that a stage trains on: all of it, or one group of classes.

    Raises:
        ValueError: the group of classes is empty.
    """
    if stage.classes is None:
        return dataset
    groups = dict(zip(("many", "medium", "few"), split_classes(dataset.counts_C, 3, stage.classes.rule), strict=True))
    return dataset.only(groups[stage.classes.group])


def _check_pairing(stage: str, batches: TrainBatches, partners: TrainBatches) -> None:
    """Raise ValueError unless the two samplers of a stage draw the same number of images."""
    if partners.draws_per_epoch != batches.draws_per_epoch:
        raise ValueError(
            f"stages.{stage}: sampler draws {batches.draws_per_epoch} images per epoch, partner_sampler "
            f"{partners.draws_per_epoch}; needed the same number, since batches are paired by row; choose samplers of "
            f"equal length"
        )
