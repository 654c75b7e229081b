"""The plan command: what a run would be, in words and tables, for whoever is about to launch it. Starts nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from itertools import groupby

from experts.progress import Progress
from experts.registry import build
from orchestration.compose import expand
from orchestration.config import RunConfig, StageConfig, published
from orchestration.placement import Plan, plan, shares_of
from orchestration.tracking_contents import default_uri, redact

_BACKWARD = 3  # a training step costs about three forward passes
_SHOWN_WORKERS = 16


def describe(config: RunConfig, nodes: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """A run in words and tables.

    Args:
        config: checked.
        nodes: resources by node, as for `placement.plan`.

    Raises:
        ValueError: as `placement.plan`.
    """
    found = plan(config, nodes)
    sections = [
        ("run", _what(config, found)),
        ("mesh", _mesh(config, found)),
        ("size", _size_table(found)),
        ("step", _step(config, found)),
        ("exchanged per step and worker", _exchange_table(found)),
        ("folder", _places(config)),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _what(config: RunConfig, found: Plan) -> Iterator[str]:
    method, data = config.method, config.dataset
    experts = f"{method.num_experts} expert{'s' if method.num_experts > 1 else ''}"
    thin = ", thinner late stages" if method.reduce_dimension else ""
    yield f"{method.name}: {experts} on one trunk, {config.backbone.name} {config.backbone.depth}{thin},"
    yield f"{method.head.name} heads, combined by {method.aggregator_in(method.final).name}; seed {config.seed}"
    yield f"data {data.name}: {_data(config, found)}, {data.image_size} x {data.image_size} pixels"
    if found.num_classes is None:
        yield "the number of classes is known when the data is opened; give dataset.num_classes=... to see what is n/a"
    for stage in found.stages:
        settings = method.stages[stage.name]
        pieces = f"objective {settings.objective.name}, sampler {settings.sampler.name}"
        yield f"stage {stage.name}: {stage.epochs} epochs, batch {stage.batch_size}, {pieces}"
        yield f"  learning rate {', '.join(_rates(settings, stage.steps_per_epoch))}"
        late = _never_reached(settings)
        if late:
            yield f"  NOTE: the stage ends before {', '.join(late)}"
    yield from textwrap.wrap(published(config) or "published: no number for exactly this config", 100)


def _data(config: RunConfig, found: Plan) -> str:
    if found.counts is None:
        classes = "n/a" if found.num_classes is None else f"{found.num_classes:,}"
        return f"classes {classes}, training images known when the data is opened"
    most, least = max(found.counts), min(found.counts)
    return (
        f"{len(found.counts):,} classes, {sum(found.counts):,} training images, {most:,} to {least:,} a class "
        f"(ratio {most / least:.4g})"
    )


def _rates(stage: StageConfig, steps: int | None) -> Iterator[str]:
    """The learning rate at the start of every epoch, runs of equal and of changing ones each in a few words."""
    schedule = build("lr_schedule", stage.lr_schedule)
    epochs = range(1, stage.epochs + 1)
    rates = [stage.optimizer.lr * schedule.factor(Progress(n, stage.epochs, 0, steps or 1)) for n in epochs]
    runs: list[list[float]] = [list(run) for _, run in groupby(rates)]
    first = 1
    while runs:
        if len(runs[0]) == 1 and len(runs) > 1:
            moving = 1 + next((i for i, run in enumerate(runs[1:]) if len(run) > 1), len(runs) - 1)
            values = [run[0] for run in runs[:moving]]
            if len(values) > 1:
                yield f"{values[0]:g} to {values[-1]:g} over epochs {first}-{first + moving - 1}"
            else:
                yield f"{values[0]:g} in epoch {first}"
            first, runs = first + moving, runs[moving:]
        else:
            last = first + len(runs[0]) - 1
            yield f"{runs[0][0]:g} in epoch{f's {first}-{last}' if last > first else f' {first}'}"
            first, runs = last + 1, runs[1:]


def _never_reached(stage: StageConfig) -> list[str]:
    """What a schedule or objective is to do after the stage's last epoch; a shortened run easily forgets it."""
    after = [m.after_epoch for m in getattr(stage.lr_schedule, "milestones", ())]
    late = [f"the learning rate's drop after epoch {n}" for n in after if n >= stage.epochs]
    switch = getattr(stage.objective, "reweight_epoch", None)
    if isinstance(switch, int) and switch >= stage.epochs:
        late.append(f"objective.reweight_epoch = {switch}")
    return late


def _mesh(config: RunConfig, found: Plan) -> Iterator[str]:
    shape, cluster = found.shape, config.cluster
    kind = "packed" if shape.slots == 1 else "spread" if shape.experts_per_worker == 1 else "grouped"
    yield (
        f"{_many(shape.workers, 'worker')} = {_many(shape.slots, 'expert slot')} x {_many(shape.replicas, 'replica')} "
        f"({kind}, {_many(shape.experts_per_worker, 'expert')} a worker)"
    )
    cpus = "an equal share of the CPUs" if cluster.cpus_per_worker is None else f"{cluster.cpus_per_worker:g} CPUs"
    device = "1 GPU, NCCL" if cluster.gpus_per_worker else "no GPU, gloo"
    threads = "as many threads as whole CPUs" if config.engine.threads is None else f"{config.engine.threads} threads"
    zero = f", ZeRO {config.engine.zero_stage}" if config.engine.name == "deepspeed" else ""
    yield f"each: {cpus}, {device}, {threads}; engine {config.engine.name}{zero}, {config.engine.precision}"
    where = cluster.address or "RAY_ADDRESS if set, else a Ray of its own on this machine"
    yield f"cluster: {where}"
    yield f"weights, gradients and momentum of a worker: {_bytes(found.memory)}; activations and buffers come on top"
    batches = {stage.name: stage.shares for stage in found.stages}
    rows = [["worker", "slot", "replica", "experts", *(f"images a step, {name}" for name in batches)]]
    for rank in range(min(shape.workers, _SHOWN_WORKERS)):
        slot, replica = shape.position(rank)
        images = [str(shares[replica]) for shares in batches.values()]
        rows.append([str(rank), str(slot), str(replica), " ".join(found.experts_on(rank)), *images])
    yield from _grid(rows, left=(3,))
    if shape.workers > _SHOWN_WORKERS:
        yield f"... and {shape.workers - _SHOWN_WORKERS} more, in the same order"


def _size_table(found: Plan) -> Iterator[str]:
    rows = [["", "parameters", "multiply-adds an image"]]
    for name, part in (("trunk", found.trunk), ("one expert", found.expert)):
        rows.append([name, _number(part.parameters), _number(part.multiply_adds)])
    rows.append(["ensemble", _number(found.whole("parameters")), _number(found.whole("multiply_adds"))])
    yield from _grid(rows, left=(0,))
    yield f"a training step costs about {_BACKWARD} times the multiply-adds of its images"
    if found.shape.slots > 1:
        share_ = "n/a" if found.repeated is None else f"{100 * found.repeated:.1f} %"
        yield f"every slot computes the trunk for itself: {share_} more multiply-adds than packed"


def _step(config: RunConfig, found: Plan) -> Iterator[str]:
    replicas = found.shape.replicas
    for stage in found.stages:
        each = _spread(stage.shares)
        yield f"stage {stage.name}: {stage.batch_size} images a step, {each} on each of {_many(replicas, 'replica')}"
        if 0 in stage.shares:
            yield f"  NOTE: {stage.shares.count(0)} replicas have no image; use fewer workers or a larger batch"
        if stage.steps_per_epoch is None or stage.images_per_epoch is None or stage.last_batch is None:
            yield "  steps per epoch are known when the data is opened"
            continue
        steps = stage.epochs * stage.steps_per_epoch
        yield (
            f"  {stage.steps_per_epoch:,} steps an epoch of {stage.images_per_epoch:,} images, {steps:,} steps in all"
            + ("" if config.run.max_steps is None else f"; run.max_steps = {config.run.max_steps:,}")
        )
        if stage.last_batch < stage.batch_size:
            last = _spread(shares_of(stage.last_batch, replicas))
            yield f"  the last step of an epoch has {_many(stage.last_batch, 'image')}, {last} on each replica"
        whole = found.whole("multiply_adds")
        if whole is not None:
            work = _BACKWARD * whole * (1 + (found.repeated or 0)) * stage.images_per_epoch
            yield f"  {work / 1e12:,.3g} T multiply-adds an epoch, {work * stage.epochs / 1e12:,.3g} T in all"


def _exchange_table(found: Plan) -> Iterator[str]:
    if not found.exchanges:
        yield "nothing: one worker"
        return
    rows = [["", "among", "own part", "sent (ring)"]]
    rows += [[x.what, str(x.among), _bytes(x.payload), _bytes(x.sent)] for x in found.exchanges]
    known = [x.sent for x in found.exchanges if x.sent is not None]
    rows.append(["in all", "", "", _bytes(sum(known) if len(known) == len(found.exchanges) else None)])
    yield from _grid(rows, left=(0,))
    yield "and the loss with its terms: a few numbers"


def _places(config: RunConfig) -> Iterator[str]:
    folder = expand(config.run.dir) / config.run_name
    there = (folder / "config.yaml").exists()
    yield f"{folder} ({'holds a run: train goes on with it if the config is the same' if there else 'new'})"
    if not config.tracking.enabled:
        yield "tracking: off"
    else:
        yield f"tracking: {redact(config.tracking.uri or default_uri(expand(config.run.dir)))}"
    split = {"auto": "the validation split where there is one, else the test split"}.get(
        config.run.select_on, f"the {config.run.select_on} split"
    )
    yield f"the best epoch is chosen on {split}"


def _grid(rows: list[list[str]], left: tuple[int, ...]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def _spread(shares: tuple[int, ...]) -> str:
    low, high = min(shares), max(shares)
    return f"{low}" if low == high else f"{low} to {high}"


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _number(value: int | None) -> str:
    return "n/a" if value is None else f"{value:,}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "n/a"
    if value < 1000:
        return f"{value} B"
    for unit, size in (("KB", 1e3), ("MB", 1e6)):
        if value < 1000 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e9:.3g} GB"
