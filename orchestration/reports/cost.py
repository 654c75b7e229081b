"""The cost of a result: parameters, multiply-adds of inference and training (counted), and hours (measured).

Multiply-adds are those of `expertail plan`, with all experts on one worker, so that runs of one recipe cost the same
wherever they were placed. Hours are those of the workers of a whole run, with all its final stages.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import experts
import orchestration.preflight
import orchestration.training
from orchestration.config.identity import identity
from orchestration.config.messages import in_one_line
from orchestration.config.run_config import RunConfig
from orchestration.preflight.plan import StagePlan, plan
from orchestration.reports.records import Record
from orchestration.reports.rows import Row, stages_to
from orchestration.reports.statistics import mean_and_sd
from orchestration.storage.files import read_json, write_json

KEPT = ".costs.json"


@dataclass(frozen=True)
class Cost:
    """The cost of a row; None where it is not known.

    Attributes:
        parameters: of the ensemble that answers.
        inference: multiply-adds per image.
        training: multiply-adds of all stages that lead to the result.
        teachers: whether stages learnt from a run that the report does not have, whose training is not in `training`.
        worker_hours, gpu_hours: of a run, mean over seeds.
    """

    parameters: int | None
    inference: int | None
    training: float | None
    teachers: bool
    worker_hours: float | None
    gpu_hours: float | None


@dataclass(frozen=True)
class _StageCost:
    """The counted cost of a stage; see `StagePlan`, whose fields these are, and `Size`."""

    epochs: int
    images_per_epoch: int | None
    steps_per_epoch: int | None
    work: float | None
    work_before: float
    work_each_epoch: float
    parameters: int | None
    inference: int | None


class Costs:
    """Counts costs, once for runs that differ in nothing but their seed.

    Counting takes seconds per recipe, so what was counted stays in the folder of the report.

    Args:
        say: takes a line where a cost cannot be counted.
        folder: of the report.
        records: of the report: what others learn from is among them, or not counted.
    """

    def __init__(self, say: Callable[[str], None], folder: Path, records: Sequence[Record] = ()) -> None:
        self._records = {(record.folder.absolute(), record.final): record for record in records}
        self._say = say
        self._file = folder / KEPT
        self._counted: dict[str, dict[str, _StageCost] | None] = {}
        try:
            self._kept = read_json(self._file)
        except (ValueError, OSError):  # damaged: counted again
            self._kept = {}

    def of(self, row: Row) -> Cost:
        """Return the cost of a row, counted for its first seed."""
        record = row.records[0]
        hours = [record.facts.get("cost") or {} for record in row.records]
        workers, _ = mean_and_sd([one["worker_hours"] for one in hours if one.get("worker_hours") is not None])
        gpus, _ = mean_and_sd([one["gpu_hours"] for one in hours if one.get("gpu_hours") is not None])
        stages = self._stages(record)
        if stages is None:
            return Cost(None, None, None, False, workers, gpus)
        total, outside = self._training(record, stages)
        final = stages[record.final]
        return Cost(final.parameters, final.inference, total, outside, workers, gpus)

    def _training(self, record: Record, stages: Mapping[str, _StageCost]) -> tuple[float | None, bool]:
        """Return the multiply-adds of all stages that lead to a result, and whether others, not counted, do, too.

        Runs that it learnt from or began with are counted once each, where the report has them.
        """
        config, needed = record.config, stages_to(record.config, record.final)
        total = _training_work([stages[name] for name in needed], sum(record.data.counts), config.run.max_steps)
        runs = {
            (source.folder(config.run.dir), source.final): source in stage.teachers.values()
            for stage in (config.method.stages[name] for name in needed)
            for source in stage.sources
            if source.run is not None
        }
        outside = False
        for (folder, final), teaches in runs.items():
            other = next((r for (f, s), r in self._records.items() if f == folder and final in (None, s)), None)
            own = None if other is None else self._stages(other)
            if other is None or own is None:
                outside |= teaches
                continue
            work, more = self._training(other, own)
            total = None if total is None or work is None else total + work
            outside |= more
        return total, outside

    def _stages(self, record: Record) -> dict[str, _StageCost] | None:
        config = _on_one_worker(record.config)
        parts = {key: value for key, value in identity(config).items() if key != "seed"}
        text = json.dumps([_counting(), parts, record.data.counts], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self._counted:
            self._counted[key] = self._read(key) or self._count(key, record, config)
        return self._counted[key]

    def _read(self, key: str) -> dict[str, _StageCost] | None:
        try:
            return {name: _StageCost(**values) for name, values in self._kept[key].items()}
        except (KeyError, TypeError, AttributeError):
            return None

    def _count(self, key: str, record: Record, config: RunConfig) -> dict[str, _StageCost] | None:
        try:
            found = {one.name: _cost_of(one) for one in plan(config, counts=record.data.counts).stages}
        except Exception as problem:  # a cost that cannot be counted must not cost the report
            self._say(f"{record.run}: its cost could not be counted: {in_one_line(problem)}")
            return None
        self._kept[key] = {name: asdict(one) for name, one in found.items()}
        with contextlib.suppress(OSError):  # the next report counts again
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self._kept)
        return found


def _cost_of(stage: StagePlan) -> _StageCost:
    return _StageCost(
        stage.epochs, stage.images_per_epoch, stage.steps_per_epoch, stage.work, stage.work_before,
        stage.work_each_epoch, stage.size.parameters, stage.size.work,
    )  # fmt: skip


@functools.cache
def _counting() -> str:
    """Return a digest of the code that is counted and that counts: another version of it counts again."""
    digest = hashlib.sha256(torch.__version__.encode())
    for root in (experts, orchestration.preflight, orchestration.training):
        for path in sorted(Path(root.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _training_work(stages: Sequence[_StageCost], images: int, max_steps: int | None) -> float | None:
    """Return the multiply-adds of stages on so many training images, of the steps that were done; None if unknown."""
    total, left = 0.0, math.inf if max_steps is None else max_steps
    for stage in stages:
        if stage.work is None or stage.images_per_epoch is None or stage.steps_per_epoch is None:
            return None
        steps = stage.epochs * stage.steps_per_epoch
        done = min(1.0, left / steps) if steps else 1.0
        left = max(left - steps, 0)
        each = stage.work * stage.images_per_epoch + stage.work_each_epoch * images
        total += stage.work_before * images + done * stage.epochs * each
    return total


def _on_one_worker(config: RunConfig) -> RunConfig:
    cluster = config.cluster.model_copy(update={"workers": 1, "experts_per_worker": None, "gpus_per_worker": 0})
    return config.model_copy(update={"cluster": cluster})
