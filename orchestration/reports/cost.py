"""The cost of a result: parameters, multiply-adds of inference and training (counted), and hours (measured).

Multiply-adds are those of `expertail plan`, with all experts on one worker, so that runs of one recipe cost the same
wherever they were placed. Hours are those of the workers of a whole run, with all its final stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestration.config.identity import identity
from orchestration.config.messages import in_one_line
from orchestration.config.run_config import RunConfig
from orchestration.preflight.plan import Plan, StagePlan, plan
from orchestration.reports.records import Record
from orchestration.reports.rows import Row, stages_to
from orchestration.reports.statistics import mean_and_sd


@dataclass(frozen=True)
class Cost:
    """The cost of a row; None where it is not known.

    Attributes:
        parameters: of the ensemble that answers.
        inference: multiply-adds per image.
        training: multiply-adds of all stages that lead to the result.
        teachers: whether stages learnt from a saved run, whose own training is not in `training`.
        worker_hours, gpu_hours: of a run, mean over seeds.
    """

    parameters: int | None
    inference: int | None
    training: float | None
    teachers: bool
    worker_hours: float | None
    gpu_hours: float | None


class Costs:
    """Counts costs, once for runs that differ in nothing but their seed.

    Args:
        say: takes a line where a cost cannot be counted.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._plans: dict[str, Plan | None] = {}

    def of(self, row: Row) -> Cost:
        """Return the cost of a row, counted for its first seed."""
        record = row.records[0]
        hours = [record.facts.get("cost") or {} for record in row.records]
        workers, _ = mean_and_sd([one["worker_hours"] for one in hours if one.get("worker_hours") is not None])
        gpus, _ = mean_and_sd([one["gpu_hours"] for one in hours if one.get("gpu_hours") is not None])
        found = self._plan(record)
        if found is None:
            return Cost(None, None, None, False, workers, gpus)
        stages = {stage.name: stage for stage in found.stages}
        final = stages[record.final]
        needed = stages_to(record.config, record.final)
        total = _training_work([stages[name] for name in needed], sum(record.data.counts), record.config.run.max_steps)
        outside = any(
            source.stage is None for name in needed for source in record.config.method.stages[name].teachers.values()
        )
        return Cost(final.size.parameters, final.size.work, total, outside, workers, gpus)

    def _plan(self, record: Record) -> Plan | None:
        config = _on_one_worker(record.config)
        parts = {key: value for key, value in identity(config).items() if key != "seed"}
        key = json.dumps([parts, record.data.counts], sort_keys=True, default=str)
        if key not in self._plans:
            try:
                self._plans[key] = plan(config, counts=record.data.counts)
            except Exception as problem:  # a cost that cannot be counted must not cost the report
                self._say(f"{record.run}: its cost could not be counted: {in_one_line(problem)}")
                self._plans[key] = None
        return self._plans[key]


def _training_work(stages: Sequence[StagePlan], images: int, max_steps: int | None) -> float | None:
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
