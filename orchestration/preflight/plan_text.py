"""The text of `expertail plan`: a section for each of run, mesh, nodes, size, step, exchanges, placements,
time and folder.

An operator reads it before a start, so every number carries its unit, and what only the data can say is n/a with the
reason. A section is a generator of lines; `describe` puts them together.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby

from experts.data.config import Augment
from experts.data.readers import open_raw
from experts.flow import PARTS
from experts.progress import Progress
from experts.registry import build, piece
from orchestration.cluster.placement import (
    bundle_of,
    draw,
    largest_share,
    pack,
    placement_wait_s,
    restart_wait_s,
    with_shape,
)
from orchestration.config.identity import published
from orchestration.config.late import never_reached
from orchestration.config.paths import expand
from orchestration.config.recipe import ModelSource, StageConfig
from orchestration.config.recipe_checks import open_choice, parts_of
from orchestration.config.run_config import RunConfig
from orchestration.config.secrets import redact
from orchestration.preflight.expected_data import FILES, listed
from orchestration.preflight.placements import Comparison, compare
from orchestration.preflight.placements_text import placement_lines
from orchestration.preflight.plan import WORKER_GIB, Plan, Size, StagePlan, plan
from orchestration.preflight.traffic import Exchange, shares_of
from orchestration.results.text import bytes_, duration, number, plural, text_table
from orchestration.storage.exports import check_sources
from orchestration.storage.url_store import is_url
from orchestration.tracking.uri import default_uri

_SHOWN_WORKERS = 16


def describe(
    config: RunConfig,
    nodes: Mapping[str, Mapping[str, float]] | str | None = None,
    time_lines: Iterable[str] | None = None,
    placements: Comparison | None = None,
) -> str:
    """Describe a run in words and tables.

    Args:
        config: validated.
        nodes: resources by node, as for `plan`; a text that says why they are unknown; or None if there is no cluster.
        time_lines: the result of a probe; None if there was none.
        placements: the run's placements, if they were compared before; else they are compared without times.

    Raises:
        ValueError: as `plan`.
    """
    known, unknown = (None, nodes) if isinstance(nodes, str) else (nodes, None)
    if placements is None and config.cluster.experts_per_worker == "auto":
        placements = compare(config, known)
        config = with_shape(config, placements.choice.shape)
    found = plan(config, known)
    placements = placements or compare(config, known, planned=found)
    sections = [
        ("run", _run(config, found)),
        ("mesh", _mesh(config, found)),
        ("nodes", _nodes(config, found, known, unknown)),
        ("size", _size_table(found)),
        ("step", _step(config, found)),
        ("exchanged per step and worker", _exchange_table(found)),
        ("placements", placement_lines(placements)),
        ("time", time_lines if time_lines is not None else _no_time()),
        ("folder", _folders(config)),
    ]
    if missing := list(_missing(config)):
        sections.append(("missing, so that `expertail train` would refuse this", missing))
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _run(config: RunConfig, found: Plan) -> Iterator[str]:
    method, data = config.method, config.dataset
    experts = plural(method.num_experts, "expert")
    thin = ", thinner late stages" if method.reduce_dimension else ""
    yield f"{method.name}: {experts} on one trunk, {config.backbone.name} {config.backbone.depth}{thin},"
    yield f"{method.head.name} heads, combined by {method.aggregator_in(method.final).name}; seed {config.seed}"
    yield f"data {data.name}: {_data(config, found)}, {data.image_size} x {data.image_size} pixels"
    for remark in found.remarks:
        yield from (f"  {line}" for line in textwrap.wrap(remark, 100, break_on_hyphens=False))
    if found.num_classes is None:
        yield "the number of classes is known when the data is opened; set dataset.num_classes=... to see what is n/a"
    for stage in found.stages:
        settings = method.stages[stage.name]
        if not stage.epochs:
            yield f"stage {stage.name}: no steps, head {method.head_in(stage.name).name}"
            yield from (f"  {line}" for line in _peculiarities(config, stage))
            yield from (f"  {line}" for line in _open_numbers(config, stage.name))
            continue
        pieces = f"objective {settings.objective.name}, sampler {settings.sampler.name}"
        if settings.class_weights is not None:
            pieces += f", class weights by {settings.class_weights.rule}"
        yield f"stage {stage.name}: {plural(stage.epochs, 'epoch')}, batch {stage.batch_size}, {pieces}"
        yield from (f"  {line}" for line in _peculiarities(config, stage))
        yield f"  learning rate {', '.join(_rates(settings, stage.steps_per_epoch))}"
        late = never_reached(settings)
        if late:
            yield f"  NOTE: the stage ends before {', '.join(late)}"
    yield from textwrap.wrap(published(config) or "published: no number for exactly this config", 100)


def _open_numbers(config: RunConfig, stage: str) -> Iterator[str]:
    """List the numbers that a stage chooses on validation images."""
    method = config.method
    for kind, settings in (("head", method.head_in(stage)), ("aggregator", method.aggregator_in(stage))):
        if (key := open_choice(kind, settings)) is not None:
            cls = piece(kind, settings.name)
            yield f"{kind}.{key}: chosen on validation images; without any, {cls.published:g} ({cls.origin})"


def _peculiarities(config: RunConfig, stage: StagePlan) -> Iterator[str]:
    """List what sets a stage apart from plain training of the whole ensemble on all classes."""
    method, settings = config.method, config.method.stages[stage.name]
    flow = piece("flow", settings.flow.name)
    if settings.classes is not None:
        yield f"knows only the {settings.classes.group} classes: {number(stage.num_classes)}"
    if stage.experts != method.expert_names:
        yield f"trains its own experts: {' '.join(stage.experts)}"
    present = parts_of(method, stage.name)
    frozen = [part for part in PARTS if part in present and part not in stage.learns]
    if frozen and stage.epochs:
        mode = "the batch's" if settings.frozen_batchnorm == "train" else "their running"
        batchnorm = "" if frozen == ["gates"] else f"; frozen BatchNorms use {mode} statistics"
        yield f"learns: {', '.join(stage.learns)}; frozen: {', '.join(frozen)}{batchnorm}"
    if settings.partner_sampler is not None:
        shown = "each is shown to its own expert" if flow.own_streams else "experts see both"
        shown = "auxiliaries see the image, the objective its partner" if flow.scores_partner else shown
        yield f"every image comes with a partner, sampler {settings.partner_sampler.name}; {shown}"
    if settings.mixing is not None:
        second = settings.mixing.second_sampler
        drawn = "of the same step" if second is None else f"of a second stream, sampler {second.name}"
        some = settings.mixing.mixed_epochs(settings.epochs)
        when = "" if len(some) == settings.epochs else f", in epochs {some[0]} to {some[-1]} of {settings.epochs}"
        yield f"images are mixed with others {drawn}: {settings.mixing.name}{when}"
    if settings.augment is not None:
        yield f"images are changed by {_stack(settings.augment)}"
    if settings.views:
        shown = "; ".join(_stack(view) for view in settings.views)
        yield f"every image comes in {len(settings.views) + 1} views; further ones: {shown}"
    yield from _auxiliaries(settings, stage)
    yield from _ramps(settings)
    source = method.starts_from(stage.name)
    if source is not None:
        yield f"starts from the weights of {_source(source)}"
    for name, teacher in settings.teachers.items():
        size = stage.teachers[name]
        what = "which is missing" if teacher.run is not None else "known when the data is opened"
        if size is not None:
            what = f"{plural(size.num_experts, 'expert')}, {number(size.num_classes)} classes"
        yield f"teacher {name}: {_source(teacher)}, {what}; {teacher.mode} mode"
    if settings.objective is not None and settings.objective.prepares:
        yield "before the first step every worker runs the teachers once on all training and validation images"


def _auxiliaries(settings: StageConfig, stage: StagePlan) -> Iterator[str]:
    """Describe what experts have beside features and head, and what it costs."""
    if not settings.auxiliaries:
        return
    names = ", ".join(f"{key} ({config.name})" for key, config in settings.auxiliaries.items())
    copy = any(config.momentum_copy is not None for config in settings.auxiliaries.values())
    held = "with a copy of the network that follows it, " if copy else ""
    yield f"auxiliaries of the experts: {names}; {held}{bytes_(stage.auxiliary_bytes)} on a worker, which no export has"
    if stage.work_each_epoch:
        yield (
            f"before every epoch trunk and features run on all training images, {stage.work_each_epoch:,.0f} "
            f"multiply-adds for each"
        )
    if makers := [key for key, config in settings.auxiliaries.items() if config.makes]:
        named = ", ".join(makers)
        yield f"further images are made by {named}, as the labels of a batch ask; the costs do not count them"


def _ramps(settings: StageConfig) -> Iterator[str]:
    """Describe weights of losses that change from epoch to epoch."""
    weights = {"the objective": settings.objective_weight} | {n: own.weight for n, own in settings.auxiliaries.items()}
    for name, ramp in weights.items():
        if not ramp.stays:
            ends = "" if ramp.after_epoch is None else f", which it has after epoch {ramp.after_epoch}"
            yield f"weight of {name}: {ramp.ramp} from {ramp.start:g} to {ramp.end:g}{ends}"


def _stack(augment: Augment) -> str:
    """Name the pieces of a stack in their order."""
    pieces = ", ".join(piece.name for piece in augment.stack) or "nothing"
    return f"{augment.name} ({pieces})" if augment.name else pieces


def _source(source: ModelSource) -> str:
    where = f"stage {source.stage}" if source.stage is not None else str(source.run)
    return f"{where}, {source.weights}"


def _data(config: RunConfig, found: Plan) -> str:
    if found.counts is None:
        classes = "n/a" if found.num_classes is None else f"{found.num_classes:,}"
        return f"classes {classes}, training images known when the data is opened"
    most, least = max(found.counts), min(found.counts)
    return (
        f"{len(found.counts):,} classes, {sum(found.counts):,} training images, {most:,} to {least:,} per class "
        f"(ratio {most / least:.4g})"
    )


def _missing(config: RunConfig) -> Iterator[str]:
    """List what training would refuse: a data folder, other runs, pretrained weights that are missing or do not fit.

    A named data folder is looked for on this machine only, and not at all if the workers run elsewhere.
    """
    data = config.dataset
    checks: list[Callable[[], object]] = [lambda: check_sources(config)]

    # Opening the data tells what is missing better than a test here could, and is quick where nothing is there.
    needs_folder = data.source != "digits" and not data.download
    here = not config.cluster.named_address and (data.source in FILES or not os.path.isdir(data.root or ""))
    if needs_folder and (data.root is None or (here and listed(data) is None)):
        checks.insert(0, lambda: open_raw(data))

    for check in checks:
        try:
            check()
        except ValueError as problems:
            for problem in str(problems).splitlines():
                yield from textwrap.wrap(problem, 100, break_on_hyphens=False, break_long_words=False)


def _rates(stage: StageConfig, steps: int | None) -> Iterator[str]:
    """Describe the learning rate at the start of every epoch; stretches of equal or changing rates take a few words."""
    assert stage.optimizer is not None
    schedule = build("lr_schedule", stage.lr_schedule)
    epochs = range(1, stage.epochs + 1)
    rates = [stage.optimizer.lr * schedule.factor(Progress(n, stage.epochs, 0, steps or 1)) for n in epochs]

    # Epochs of one rate form a run; neighbouring runs of one epoch each, as in a warm-up, are described together.
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


def _mesh(config: RunConfig, found: Plan) -> Iterator[str]:
    shape, cluster = found.shape, config.cluster
    kind = "packed" if shape.slots == 1 else "spread" if shape.experts_per_worker == 1 else "grouped"
    yield (
        f"{plural(shape.workers, 'worker')} = {plural(shape.slots, 'expert slot')} x "
        f"{plural(shape.replicas, 'replica')} ({kind}, {plural(shape.experts_per_worker, 'expert')} per worker)"
    )
    cpus = "an equal share of the CPUs" if cluster.cpus_per_worker is None else f"{cluster.cpus_per_worker:g} CPUs"
    device = "1 GPU, NCCL" if cluster.gpus_per_worker else "no GPU, gloo"
    threads = "as many threads as whole CPUs" if config.engine.threads is None else f"{config.engine.threads} threads"
    engine = config.engine.chosen(shape.workers)
    zero = f", ZeRO {config.engine.zero_stage}" if engine == "deepspeed" else ""
    computing = ", ".join(dict.fromkeys([config.engine.precision, *config.engine.differences]))
    yield f"each: {cpus}, {device}, {threads}; engine {engine}{zero}, {computing}"
    where = cluster.address or "RAY_ADDRESS if set, else its own Ray on this machine"
    short, job = placement_wait_s(cluster), placement_wait_s(cluster, job=True)
    wait = duration(short) + (f", {duration(job)} in a submitted job" if job != short else "")
    yield f"cluster: {where}; a start waits up to {wait} for places that others hold,"
    yield f"a restart {duration(restart_wait_s(cluster))} for a node"
    yield from _waves(found)

    teachers = " and teachers" if any(stage.teachers for stage in found.stages) else ""
    most = "" if found.memory is None else " at most"
    yield f"weights, gradients, momentum{teachers} of a worker: {bytes_(found.memory)}{most}; libraries, images and"
    low, high = WORKER_GIB
    yield f"activations add {low} to {high} GiB with small images (measured); `--probe` measures this run's"

    batches = {stage.name: stage.shares for stage in found.stages if stage.epochs}
    rows = [["worker", "slot", "replica", "experts", *(f"images per step, {name}" for name in batches)]]
    for rank in range(min(shape.workers, _SHOWN_WORKERS)):
        slot, replica = shape.position(rank)
        images = [str(shares[replica]) for shares in batches.values()]
        rows.append([str(rank), str(slot), str(replica), " ".join(found.experts_on(rank)), *images])
    yield from text_table(rows, left=(3,))
    if shape.workers > _SHOWN_WORKERS:
        yield f"... and {shape.workers - _SHOWN_WORKERS} more, in the same order"


def _nodes(
    config: RunConfig, found: Plan, nodes: Mapping[str, Mapping[str, float]] | None, unknown: str | None
) -> Iterator[str]:
    if nodes is None:
        yield f"n/a: {unknown or 'no cluster is named; set cluster.address to see its nodes'}"
        return
    cpus = config.cluster.cpus_per_worker or largest_share(
        found.shape.workers * found.side_by_side, [node.get("CPU", 0.0) for node in nodes.values()]
    )
    placement = pack(found.shape.workers, bundle_of(config.cluster, cpus), nodes)
    if placement is None:
        yield f"n/a: {plural(len(nodes), 'node')}, without room for all workers"
        return
    placement = placement.seated(found.shape.replicas)
    experts = {rank: found.experts_on(rank) for rank in range(found.shape.workers)}
    yield "as Ray packs them when nothing else runs; it may fill another of several equal nodes first"
    yield from draw(placement, nodes, found.shape, experts, _SHOWN_WORKERS)


def _no_time() -> Iterator[str]:
    yield "n/a: nothing was run; `expertail plan --probe ...` takes a few steps and estimates the hours from them"


def _waves(found: Plan) -> Iterator[str]:
    """List the stages that need not wait for each other."""
    for wave in found.waves:
        if len(wave) > 1:
            at_once = min(len(wave), found.side_by_side)
            places = at_once * found.shape.workers
            yield (
                f"stages {', '.join(wave)}: {at_once} at a time, each on its own workers, "
                f"{plural(places, 'worker')} in all; with less room they wait for each other"
            )


def _size_table(found: Plan) -> Iterator[str]:
    rows = [["", "parameters", "multiply-adds per image", "FLOPs per image"]]
    stages_of: dict[Size, list[str]] = {}  # stages of one size share their rows
    for stage in found.stages:
        stages_of.setdefault(stage.size, []).append(stage.name)
    for size, stages in stages_of.items():
        if len(stages_of) > 1:
            rows.append([f"stage {', '.join(stages)}", "", "", ""])
        rows.append(["trunk", number(size.trunk), *_work_and_flops(size.trunk_work)])
        rows.append(["one expert", _range(size.experts), *_work_and_flops(size.expert_work)])
        if size.shared:
            rows.append(["shared last layer", number(size.shared), "", ""])
        rows.append(["ensemble", number(size.parameters), *_work_and_flops(size.work)])
    yield from text_table(rows, left=(0,))
    yield "forward pass, as in inference, convolutions and linear layers only; one multiply-add is two FLOPs"


def _work_and_flops(work: int | None) -> tuple[str, str]:
    return number(work), number(None if work is None else 2 * work)


def _range(values: tuple[int | None, ...]) -> str:
    known = {value for value in values if value is not None}
    if len(known) < len(set(values)):
        return "n/a"
    return number(min(known)) if len(known) == 1 else f"{number(min(known))} to {number(max(known))}"


def _step(config: RunConfig, found: Plan) -> Iterator[str]:
    replicas = found.shape.replicas
    for stage in found.stages:
        if not stage.epochs:
            fits = piece("head", config.method.head_in(stage.name).name).fits
            yield f"stage {stage.name}: no steps" + ("; its heads are fitted to all training images" if fits else "")
            continue
        each = _spread(stage.shares)
        yield f"stage {stage.name}: {stage.batch_size} images per step, {each} on each of {plural(replicas, 'replica')}"
        if 0 in stage.shares:
            empty = plural(stage.shares.count(0), "replica")
            yield f"  NOTE: {empty} without an image; use fewer workers or a larger batch"
        yield from (f"  {line}" for line in _work(config.method.stages[stage.name], stage, found))
        if stage.steps_per_epoch is None or stage.images_per_epoch is None or stage.last_batch is None:
            yield "  steps per epoch are known when the data is opened"
            continue
        steps = stage.epochs * stage.steps_per_epoch
        limit = config.run.max_steps
        yield (
            f"  {stage.steps_per_epoch:,} steps per epoch of {stage.images_per_epoch:,} images, {steps:,} steps in all"
            + ("" if limit is None else f"; run.max_steps = {limit:,}")
        )
        if stage.last_batch < stage.batch_size:
            last = _spread(shares_of(stage.last_batch, replicas))
            yield f"  the last step of an epoch has {plural(stage.last_batch, 'image')}, {last} on each replica"
        if stage.work is not None:
            # A sampler may draw more or fewer images than there are, which auxiliaries see once per epoch.
            work = stage.work * stage.images_per_epoch + stage.work_each_epoch * sum(found.counts or ())
            yield f"  {work / 1e12:,.3g} T multiply-adds per epoch, {work * stage.epochs / 1e12:,.3g} T in all"


def _work(settings: StageConfig, stage: StagePlan, found: Plan) -> Iterator[str]:
    """Describe what a training step computes per image, and what spreading adds to it."""
    pair = " and its partner" if settings.partner_sampler is not None else ""
    most = "at most " if settings.flow.skips_images else ""
    work = "n/a" if stage.work is None else f"{most}{stage.work:,.0f}"
    flops = "" if stage.work is None else f" ({most}{2 * stage.work:,.0f} FLOPs)"
    yield f"{work} multiply-adds for each image{pair}, forward and backward{flops}"
    if stage.work_before:
        yield (
            f"of the heads alone; trunk and features run once before the first step, {stage.work_before:,.0f} "
            f"multiply-adds for each training image"
        )
        return
    if found.shape.slots == 1:
        return
    if piece("flow", settings.flow.name).own_streams:
        yield "every slot runs the trunk on its own images: no more multiply-adds than packed"
    else:
        extra = "n/a" if stage.repeated is None else f"{100 * stage.repeated:.1f} %"
        yield f"every slot runs the trunk again: forward multiply-adds grow by {extra} over packed"


def _exchange_table(found: Plan) -> Iterator[str]:
    if found.shape.workers == 1:
        yield "nothing: one worker"
        return
    stages_with: dict[tuple[Exchange, ...], list[StagePlan]] = {}  # stages with equal exchanges share a table
    for stage in found.stages:
        if stage.epochs:
            stages_with.setdefault(stage.exchanges, []).append(stage)
    for exchanges, stages in stages_with.items():
        if len(found.stages) > 1:
            yield f"stage {', '.join(stage.name for stage in stages)}"
        rows = [["", "", "workers", "own part", "sent (ring)"]]
        for x in exchanges:
            sent = [x.sent(slot) for slot in range(found.shape.slots)]
            most = None if None in sent else max(sent)  # type: ignore[type-var]
            rows.append([x.what, x.kind, str(x.among), bytes_(x.payload), bytes_(most)])
        rows.append(["in all", "", "", "", bytes_(stages[0].sent())])
        yield from text_table(rows, left=(0, 1))
    without = [stage.name for stage in found.stages if not stage.epochs]
    if without:
        yield f"stage {', '.join(without)}: no steps"
    if found.shape.slots > 1 and stages_with:
        yield "each row is for the slot that sends most; no feature maps are exchanged"


def _folders(config: RunConfig) -> Iterator[str]:
    if is_url(config.run.dir):
        from orchestration.storage.location import run_path

        yield f"{config.run.dir.rstrip('/')}/{config.run_name} (the driver works in {run_path(config)})"
        if config.tracking.enabled:
            unset = "tracking.uri is not set: `expertail train` will refuse this"
            yield f"tracking: {redact(config.tracking.uri or unset)}"
        return
    folder = expand(config.run.dir) / config.run_name
    there = (folder / "config.yaml").exists()
    yield f"{folder} ({'holds a run: `expertail train` resumes it if the config is the same' if there else 'new'})"
    if not config.tracking.enabled:
        yield "tracking: off"
    else:
        yield f"tracking: {redact(config.tracking.uri or default_uri(expand(config.run.dir)))}"
    split = {"auto": "the validation split where there is one, else the test split"}.get(
        config.run.select_on, f"the {config.run.select_on} split"
    )
    yield f"the best epoch is chosen on {split}"


def _spread(shares: tuple[int, ...]) -> str:
    low, high = min(shares), max(shares)
    return f"{low}" if low == high else f"{low} to {high}"
