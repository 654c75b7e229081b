"""Tables of rows: results that may be compared, those of one recipe over its seeds in one row.

Two results are in one table if their runs saw the same data (digest), were measured on the same images, and had the
same backbone, image size and length of training. Learning rates, batch sizes and augmentation belong to recipes, as in
the papers: rows of one table may differ in them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestration.config.identity import identity
from orchestration.config.paths import sibling_of
from orchestration.config.run_config import RunConfig
from orchestration.reports.records import Data, LeftOut, Model, Record
from orchestration.reports.statistics import mean_and_sd
from orchestration.results.text import plural

_OF_DATA = ("dataset.augment", "dataset.eval", "dataset.mean", "dataset.std")
"""Keys of the data set that belong to a recipe; the digest and `Schedule` answer for the others."""
_HOW = ("threads", "deterministic", "compile", "memory_format", "zero_stage", "sync_batchnorm")
"""Keys of the engine that change the last bits of a result at most."""
_PARTS = ("method", "mix", "then")
_NONE = "none"  # as a study calls no mixing and no further stage
_MOST_KEYS = 4  # of a label; more cannot be read


class Schedule(NamedTuple):
    """The conditions that the rows of one table share besides the data.

    Attributes:
        backbone: name and depth.
        image_size: pixels.
        epochs: of the longest stage that leads to the result.
        max_steps: that the run was cut after, if any.
        split, images: that were measured.
    """

    backbone: str
    image_size: int | None
    epochs: int
    max_steps: int | None
    split: str
    images: int | None

    @property
    def length(self) -> str:
        """The length of training, in words."""
        return plural(self.epochs, "epoch")

    @property
    def line(self) -> str:
        cut = f", cut after {self.max_steps:,} steps" if self.max_steps else ""
        images = f" ({self.images:,} images)" if self.images else ""
        return f"{self.backbone}, {self.image_size} pixels, {self.length}{cut}; measured on {self.split}{images}"


@dataclass(frozen=True)
class Row:
    """Results of one recipe over its seeds.

    Attributes:
        label: unique in its table.
        records: one per seed, in the order of seeds; at least one.
    """

    label: str
    records: tuple[Record, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.seed for record in self.records)

    @property
    def config(self) -> RunConfig:
        return self.records[0].config

    def models(self, which: str) -> dict[int, Model]:
        """Return the models by seed; "last" stands in where there is no "best", which is the same model then."""
        return {record.seed: record.models.get(which) or record.models["last"] for record in self.records}

    def values(self, key: str, which: str = "last") -> dict[int, float]:
        """Return a measure by seed, of the seeds that have it."""
        found = {seed: model.values.get(key) for seed, model in self.models(which).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def spread(self, key: str, which: str = "last") -> tuple[float | None, float | None]:
        """Return the mean of a measure over seeds and its standard deviation; None where there is none."""
        return mean_and_sd(list(self.values(key, which).values()))


@dataclass(frozen=True)
class Table:
    """Rows that may be compared.

    Attributes:
        number: from 1.
        data, schedule: that they have in common.
        rows: at least one.
    """

    number: int
    data: Data
    schedule: Schedule
    rows: tuple[Row, ...]

    def row(self, label: str) -> Row | None:
        return next((row for row in self.rows if row.label == label), None)


def stages_to(config: RunConfig, final: str) -> tuple[str, ...]:
    """Return the stages that a result needs, itself among them, in the order of the recipe."""
    needed, todo = set(), [final]
    while todo:
        stage = todo.pop()
        if stage in needed:
            continue
        needed.add(stage)
        start = config.method.starts_from(stage)
        sources = [*config.method.stages[stage].teachers.values(), *([start] if start else [])]
        todo += [source.stage for source in sources if source.stage in config.method.stages]
    return tuple(stage for stage in config.method.stages if stage in needed)


def schedule_of(record: Record) -> Schedule:
    """Return what a result has in common with those that it may be compared with."""
    config, model = record.config, record.models["last"]
    backbone = f"{config.backbone.name} {config.backbone.depth}"
    epochs = max(config.method.stages[stage].epochs for stage in stages_to(config, record.final))
    return Schedule(backbone, config.dataset.image_size, epochs, config.run.max_steps, model.split, model.images)


def recipe_keys(record: Record) -> dict[str, Any]:
    """Return the keys of a config that make a row: all that decides the result but seed and data."""
    stages = stages_to(record.config, record.final)
    kept = {}
    for key, value in identity(record.config).items():
        section, _, rest = key.partition(".")
        if key in ("seed", "method.name") or (section == "engine" and rest in _HOW):
            continue
        if section == "dataset" and not key.startswith(_OF_DATA):
            continue
        if key.startswith("method.stages.") and key.split(".")[2] not in stages:
            continue
        # A sibling is a recipe's run with the same seed.
        its = key.endswith(".run") and value is not None and sibling_of(value)
        kept[key] = value.removesuffix(f"-s{record.seed}") if its else value
    return {**kept, "recipe": base_name(record)}


def base_name(record: Record) -> str:
    """Return the recipe's own name, with the final stage where a run has several."""
    return recipe_name(record.config, record.stage)


def recipe_name(config: RunConfig, stage: str = "") -> str:
    """Return a recipe's name, with the final stage where it has several: ce+ncm."""
    method = config.method
    return f"{loss_label(method.name, method.finals)}+{stage}" if stage else method.name


def loss_label(method: str, finals: Sequence[str]) -> str:
    """Return a method's name without the final stages that composing has appended: `ldam+ncm+crt` -> `ldam`."""
    words = [word for word in method.split("+") if word not in finals]
    return "+".join(words) or method


def tables(
    records: Sequence[Record], varied: Collection[str] = (), axes: Collection[str] = ()
) -> tuple[list[Table], list[LeftOut]]:
    """Sort results into rows and tables.

    Args:
        records: in the order in which rows shall come.
        varied: keys in which labels of a study differ; others are not worth naming.
        axes: those of them that its recipes do not say; a recipe with a label of its own names these alone.

    Returns:
        The tables, and results that are left out because the same was there before.
    """
    by_table: dict[tuple[str, Schedule], list[Record]] = {}
    for record in records:
        by_table.setdefault((record.data.digest, schedule_of(record)), []).append(record)
    found: list[Table] = []
    doubles: list[LeftOut] = []
    for (_, schedule), own in by_table.items():
        rows: dict[str, dict[int, Record]] = {}
        keys: dict[str, dict[str, Any]] = {}
        for record in own:
            key = recipe_keys(record)
            name = repr(sorted(key.items(), key=lambda item: item[0]))
            earlier = rows.setdefault(name, {}).setdefault(record.seed, record)
            keys[name] = key
            if earlier is not record:
                doubles.append(_double(record, earlier))
        labels = _labels({name: next(iter(of.values())) for name, of in rows.items()}, keys, varied, axes)
        found.append(
            Table(
                len(found) + 1,
                own[0].data,
                schedule,
                tuple(Row(labels[name], tuple(of[s] for s in sorted(of))) for name, of in rows.items()),
            )
        )
    return found, doubles


def _double(record: Record, earlier: Record) -> LeftOut:
    stage = f", stage {record.stage}" if record.stage else ""
    return LeftOut(
        record.run, "left out", f"the same recipe, data and seed as {earlier.folder}{stage}; that one is shown"
    )


def _labels(
    records: Mapping[str, Record],
    keys: Mapping[str, Mapping[str, Any]],
    varied: Collection[str],
    axes: Collection[str],
) -> dict[str, str]:
    """Return a label for each row: its name, and what tells it from others of this name."""
    names = {name: _study_label(record, varied, axes) for name, record in records.items()}
    found = {}
    for name, label in names.items():
        others = [other for other, its in names.items() if its == label]
        found[name] = " ".join([label, *_differing(name, others, keys)])
    # What is still equal is told apart by the names of runs: no two are equal in one folder.
    alike = [name for name, label in found.items() if list(found.values()).count(label) > 1]
    for name in alike:
        found[name] += f" ({re.sub(r'-s[0-9]+$', '', records[name].run)})"
    return found


def _study_label(record: Record, varied: Collection[str], axes: Collection[str]) -> str:
    """Return the label that a study gives, or the recipe's own name."""
    label = record.label
    if not label:
        return base_name(record)
    own = label.get("recipe")
    named = [key for key in label if key in varied and key != "recipe" and not key.startswith("dataset.")]
    keys = [key for key in named if key not in _PARTS and (own is None or key in axes)]
    shown = [f"{short_key(key)}={label[key]}" for key in keys]
    if own is not None:
        parts = [str(label[part]) for part in _PARTS if part in axes and label.get(part, _NONE) != _NONE]
        stage = [record.stage] if record.stage else []
        return " ".join(["+".join([str(own), *parts, *stage]), *shown])
    parts = [str(label[part]) for part in _PARTS if label.get(part, _NONE) != _NONE]
    parts = [part.strip("[]").replace(",", "+") for part in parts]  # `then=[crt,lws]`
    if record.stage:
        method = record.config.method
        parts = [loss_label("+".join(parts), method.finals) if parts else loss_label(method.name, method.finals)]
        parts.append(record.stage)
    # A recipe without a part in its label is the same in all runs of the study.
    return " ".join(["+".join(parts) or base_name(record), *shown])


def _differing(name: str, others: Sequence[str], keys: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return `key=value` for the keys in which rows of one name differ; nothing where they are too many to read."""
    absent = object()
    every = dict.fromkeys(key for other in others for key in keys[other])
    own = keys[name]
    differ = [key for key in every if any(keys[other].get(key, absent) != own.get(key, absent) for other in others)]
    return [f"{short_key(key)}={own.get(key, 'unset')}" for key in differ] if len(differ) <= _MOST_KEYS else []


def short_key(key: str) -> str:
    """Return a key's last part, with the one before it where it says little alone."""
    parts = key.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("name", "factor", "epochs", "ratio", "scale") else parts[-1]


def apart_lines(found: Iterable[Table]) -> list[str]:
    """Say why there are several tables; nothing for one."""
    all_ = list(found)
    if len(all_) < 2:
        return []
    schedules = [table.schedule for table in all_]
    reasons = []
    digests = {table.data.digest: table.data for table in all_}
    if len(digests) > 1:
        reasons.append("data (" + "; ".join(f"{one.line} {one.digest[:8]}" for one in digests.values()) + ")")
    for field in Schedule._fields:
        values = list(dict.fromkeys(getattr(one, field) for one in schedules))
        if len(values) > 1:
            reasons.append(f"{field.replace('_', ' ')} ({', '.join(map(str, values))})")
    return [
        f"{len(all_)} tables, because their runs differ in {'; '.join(reasons)}: those are not compared with each other"
    ]
