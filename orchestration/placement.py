"""Where a run's experts and images would lie, what crosses the network, what it costs: a pure function of its config.

Nothing is started and no data is read, so sizes of sets that list or scan files stay open. plan.py puts it in words.

Letters: E experts in all, e in one slot, S expert slots, R replicas, W = S R workers, B images, C classes, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from experts.backbones.cost import multiply_adds
from experts.data.batches import share
from experts.data.imbalance import hold_out, long_tailed_counts, select
from experts.ensemble import build_ensemble
from experts.registry import build
from orchestration.config import RunConfig, StageConfig
from orchestration.mesh import MeshShape, mesh_shape

_DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
_TRAINING_IMAGES = {"digits": _DIGITS, "fashion_mnist": (6000,) * 10, "cifar10": (5000,) * 10, "cifar100": (500,) * 100}


@dataclass(frozen=True)
class Size:
    """Parameters, BatchNorm channels and multiply-adds per image of one part; `None` where they need C."""

    parameters: int | None
    multiply_adds: int | None
    bn_layers: int
    bn_channels: int


@dataclass(frozen=True)
class Exchange:
    """One thing that workers exchange in every step.

    Attributes:
        what: in words.
        among: workers that take part.
        payload: bytes that one worker puts in; None where that needs C.
        sent: bytes that one worker sends if the exchange runs as a ring.
    """

    what: str
    among: int
    payload: int | None
    sent: int | None


@dataclass(frozen=True)
class StagePlan:
    """Steps of one stage. `steps_per_epoch` and `last_batch` are None where the number of images is not known."""

    name: str
    epochs: int
    batch_size: int
    shares: tuple[int, ...]
    images_per_epoch: int | None
    steps_per_epoch: int | None
    last_batch: int | None


@dataclass(frozen=True)
class Plan:
    """A run's placement and cost.

    Attributes:
        num_classes: C, None if only the data can say.
        counts: training images per class, None if only the data can say.
        trunk, expert: sizes of the shared part and of one expert.
        exchanges: of one step; empty with one worker.
        memory: bytes of weights, gradients and optimiser state on one worker.
        repeated: multiply-adds that spread adds, as a share of those of the ensemble in one place.
    """

    shape: MeshShape
    expert_names: tuple[str, ...]
    num_classes: int | None
    counts: tuple[int, ...] | None
    trunk: Size
    expert: Size
    stages: tuple[StagePlan, ...]
    exchanges: tuple[Exchange, ...]
    memory: int | None
    repeated: float | None

    def experts_on(self, rank: int) -> tuple[str, ...]:
        """Names of the experts of a worker."""
        return tuple(self.expert_names[i] for i in self.shape.experts_of(self.shape.position(rank)[0]))

    def whole(self, name: str) -> int | None:
        """Parameters or multiply_adds of trunk and all experts in one place."""
        return _plus(getattr(self.trunk, name), _times(getattr(self.expert, name), self.shape.num_experts))


def plan(config: RunConfig, nodes: Mapping[str, Mapping[str, float]] | None = None) -> Plan:
    """Lay a run out.

    Args:
        config: checked.
        nodes: resources by node, as Ray names them; given, a placement that they cannot hold is refused.

    Raises:
        ValueError: experts and workers do not fit, the counts asked for do not exist, or the nodes are too few.
    """
    shape = mesh_shape(config.method.num_experts, config.cluster.workers, config.cluster.experts_per_worker)
    if nodes is not None and config.cluster.cpus_per_worker is not None:
        from orchestration.fleet import check_fits

        check_fits(
            shape.workers,
            config.cluster.cpus_per_worker,
            config.cluster.gpus_per_worker,
            {name: dict(resources) for name, resources in nodes.items()},
        )
    num_classes = _num_classes(config)
    counts = expected_counts(config, num_classes)
    trunk, expert, logit_bytes = _sizes(config, num_classes)
    batch = max(stage.batch_size for stage in config.method.stages.values())
    repeated = None
    if trunk.multiply_adds is not None and expert.multiply_adds is not None:
        whole = trunk.multiply_adds + shape.num_experts * expert.multiply_adds
        repeated = (shape.slots - 1) * trunk.multiply_adds / whole
    return Plan(
        shape=shape,
        expert_names=config.method.expert_names,
        num_classes=num_classes,
        counts=None if counts is None else tuple(counts.tolist()),
        trunk=trunk,
        expert=expert,
        stages=tuple(_stage(name, stage, shape, counts) for name, stage in config.method.stages.items()),
        exchanges=tuple(_exchanges(config, shape, trunk, expert, num_classes, batch, logit_bytes)),
        memory=_memory(config, shape, trunk, expert),
        repeated=repeated,
    )


def expected_counts(config: RunConfig, num_classes: int | None) -> np.ndarray | None:
    """Training images per class, int64 [C], where the config and the published sizes of a set decide them; else None.

    Raises:
        ValueError: the set has fewer images than the keys ask for.
    """
    data = config.dataset
    found = _TRAINING_IMAGES.get(data.source)
    if found is None or num_classes is None:
        ratio, largest = data.imbalance_ratio, data.max_per_class
        if None in (num_classes, ratio, largest) or data.val_per_class or data.balanced:
            return None
        assert num_classes is not None and ratio is not None and largest is not None
        return long_tailed_counts(num_classes, largest, ratio, data.imbalance_type)
    labels = np.repeat(np.arange(num_classes), found)
    if data.test_per_class:
        labels = labels[hold_out(labels, num_classes, data.test_per_class, "test_per_class")[0]]
    chosen = select(
        labels,
        num_classes,
        imbalance_ratio=data.imbalance_ratio,
        kind=data.imbalance_type,
        max_per_class=data.max_per_class,
        balanced=data.balanced,
        val_per_class=data.val_per_class,
    )
    return np.bincount(labels[chosen.train], minlength=num_classes)


def _num_classes(config: RunConfig) -> int | None:
    known = _TRAINING_IMAGES.get(config.dataset.source)
    given = config.dataset.num_classes
    if known and given not in (None, len(known)):
        raise ValueError(
            f"dataset.num_classes = {given}: {config.dataset.source} has {len(known)} classes; "
            f"set dataset.num_classes={len(known)} or null"
        )
    return len(known) if known else given


def _sizes(config: RunConfig, num_classes: int | None) -> tuple[Size, Size, int]:
    """Of the trunk and of one expert (all are alike), and the bytes of one logit."""
    method = config.method
    model = build_ensemble(
        config.backbone,
        method.head,
        num_classes=num_classes or 2,
        expert_names=method.expert_names,
        reduce_dimension=method.reduce_dimension,
        seed=config.seed,
        only=method.expert_names[:1],
    )
    expert = model.experts[method.expert_names[0]]
    image = torch.zeros(1, 3, config.dataset.image_size, config.dataset.image_size)
    with torch.no_grad():
        h = model.trunk.eval()(image)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "autocast"):
            logit_bytes = model.eval()(image).element_size()
    if config.engine.precision == "float64":
        logit_bytes = 8
    known = num_classes is not None
    return (
        Size(_count(model.trunk), multiply_adds(model.trunk, image), *_batchnorm(model.trunk)),
        Size(
            _count(expert) if known else None,
            multiply_adds(expert, h) if known else None,
            *_batchnorm(expert),
        ),
        logit_bytes,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _batchnorm(module: nn.Module) -> tuple[int, int]:
    channels = [part.num_features for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    return len(channels), sum(channels)


def _stage(name: str, stage: StageConfig, shape: MeshShape, counts: np.ndarray | None) -> StagePlan:
    shares = shares_of(stage.batch_size, shape.replicas)
    images = steps = last = None
    if counts is not None:
        labels = np.repeat(np.arange(len(counts)), counts)
        images = build("sampler", stage.sampler, labels, len(counts)).draws_per_epoch
        whole, rest = divmod(images, stage.batch_size)
        if stage.drop_last:
            images, rest = whole * stage.batch_size, 0
        if not images:
            raise ValueError(
                f"method.stages.{name}.batch_size = {stage.batch_size} with drop_last: an epoch has no whole batch; "
                f"lower batch_size"
            )
        steps, last = whole + (rest > 0), rest or stage.batch_size
    return StagePlan(name, stage.epochs, stage.batch_size, shares, images, steps, last)


def shares_of(images: int, replicas: int) -> tuple[int, ...]:
    """Images of each replica; the first ones have one more where they do not divide evenly."""
    bounds = [share(images, replica, replicas) for replica in range(replicas)]
    return tuple(stop - start for start, stop in bounds)


def _exchanges(
    config: RunConfig,
    shape: MeshShape,
    trunk: Size,
    expert: Size,
    num_classes: int | None,
    batch: int,
    logit_bytes: int,
) -> Iterator[Exchange]:
    number = 8 if config.engine.precision == "float64" else 4  # bytes
    e, slots, replicas, workers = shape.experts_per_worker, shape.slots, shape.replicas, shape.workers
    own = _times(expert.parameters, e)
    if slots > 1:
        logits = None if num_classes is None else e * max(shares_of(batch, replicas)) * num_classes * logit_bytes
        yield Exchange("logits, all-gather over slots", slots, logits, _times(logits, slots - 1))
    if workers > 1:
        yield _all_reduce("trunk gradient, sum over all workers", workers, _times(trunk.parameters, number))
    if replicas > 1:
        yield _all_reduce("expert gradients, sum over replicas", replicas, _times(own, number))
    if config.engine.name == "deepspeed":
        if workers > 1:
            yield _parts("updated trunk (ZeRO), all-gather", workers, _times(trunk.parameters, number))
        if replicas > 1:
            yield _parts("updated experts (ZeRO), all-gather", replicas, _times(own, number))
    if replicas > 1 and config.engine.sync_batchnorm:
        layers, channels = trunk.bn_layers + e * expert.bn_layers, trunk.bn_channels + e * expert.bn_channels
        forward, backward = (2 * channels + layers) * number, 2 * channels * number
        sent = forward * (replicas - 1) + _ring(backward, replicas)
        what = f"BatchNorm statistics of {layers} layers"
        yield Exchange(what, replicas, forward + backward, sent)


def _all_reduce(what: str, among: int, payload: int | None) -> Exchange:
    return Exchange(what, among, payload, None if payload is None else _ring(payload, among))


def _parts(what: str, among: int, whole: int | None) -> Exchange:
    """Everyone gives one part of a whole and receives the others."""
    payload = None if whole is None else -(-whole // among)
    return Exchange(what, among, payload, _times(payload, among - 1))


def _ring(payload: int, among: int) -> int:
    return round(2 * payload * (among - 1) / among)


def _memory(config: RunConfig, shape: MeshShape, trunk: Size, expert: Size) -> int | None:
    """Bytes of weights, gradients, momentum and, with ZeRO, the part of the master weights, on one worker."""
    if trunk.parameters is None or expert.parameters is None:
        return None
    number = 8 if config.engine.precision == "float64" else 4
    momentum = any(stage.optimizer.momentum for stage in config.method.stages.values())
    total = 0.0
    groups = ((trunk.parameters, shape.workers), (shape.experts_per_worker * expert.parameters, shape.replicas))
    for parameters, among in groups:
        if config.engine.name == "torch":
            copies = 2.0 + momentum
        else:
            gradients = 1.0 if config.engine.zero_stage == 1 else 1 / among
            copies = 1.0 + gradients + (1 + momentum) / among
        total += parameters * copies * number
    return round(total)


def _plus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _times(a: int | None, b: int) -> int | None:
    return None if a is None else a * b
