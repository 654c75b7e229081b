"""Measure what predictions are made of: what one worker computes in a step, and all-reduces between two workers.

Neither needs data, weights or partners: images are black, and the mesh of the step exists on paper, as in a rehearsal.
But here convolutions are computed. node_speed.py runs both on nodes of the cluster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from orchestration.cluster.placement import shape_of
from orchestration.config.run_config import RunConfig
from orchestration.preflight.blanks import blank_dataset, blank_teachers
from orchestration.preflight.rehearsal import blank_batch
from orchestration.preflight.traffic import shares_of
from orchestration.training.engine import TorchEngine
from orchestration.training.exchange import Group, record_groups
from orchestration.training.mesh import Mesh
from orchestration.training.precision import use_precision
from orchestration.training.stage_setup import TrainingSetup
from orchestration.training.step import TrainingStep

SMALL, LARGE = 1 << 10, 1 << 22
"""Bytes of the all-reduces that are timed: one that is all latency, one as large as the experts of a ResNet-32."""
_WARM_UP = 4  # steps that still allocate memory, or capture graphs
_STEPS = (3, 20)  # the fewest and the most that are timed
_ENOUGH_S = 1.5  # of steps, once the fewest are timed
_SLOW_S = 5.0  # a step that takes as long is taken once
_EXCHANGES = 20


def time_step(config: RunConfig, stage: str, counts_C: np.ndarray, device: str = "cpu") -> float:
    """Return the median seconds that the first worker of a mesh computes in a step, without its exchanges.

    Args:
        config: of the run, with its mesh. Weights from files are left out: they cost no time in a step. Nothing is
            compiled.
        stage: with steps.
        counts_C: training images per class.
        device: "cpu" or "cuda".
    """
    use_precision(config.engine, torch.device(device))
    setup = _setup(config, stage, counts_C, device)
    try:
        batch_size, replicas = setup.stage.batch_size, setup.mesh.shape.replicas
        assert batch_size is not None
        return _step_s(setup, shares_of(batch_size, replicas)[0])
    finally:
        setup.close()


def _setup(config: RunConfig, stage: str, counts_C: np.ndarray, device: str) -> TrainingSetup:
    method = config.method
    stages = {**method.stages, stage: method.stages[stage].model_copy(update={"drop_last": False})}
    method = method.model_copy(update={"backbone_weights": None, "stages": stages})
    config = config.model_copy(update={"method": method})
    teachers = blank_teachers(config, stage, counts_C, counts_known=True)
    models = {name: teacher.fresh() for name, teacher in teachers.items()}

    shape = shape_of(method.num_experts, config.cluster)
    mesh = Mesh(shape, device=device, groups=record_groups(shape.slots, shape.replicas, 0, []))
    setup = TrainingSetup(config, stage, blank_dataset(config.dataset, counts_C), mesh, models, TorchEngine)
    setup.objective.assume_prepared()
    return setup


def _step_s(setup: TrainingSetup, images: int) -> float:
    step, now, device = TrainingStep(setup), setup.progress(0), setup.mesh.device
    batch = blank_batch(setup, images)

    def timed() -> float:
        return _timed(lambda: step(batch, now), device)

    try:
        for _ in range(_WARM_UP):
            if (first := timed()) > _SLOW_S:  # where a step is so long, what comes with the first one is little of it
                return first
        seconds = list[float]()
        while len(seconds) < _STEPS[0] or (sum(seconds) < _ENOUGH_S and len(seconds) < _STEPS[1]):
            seconds.append(timed())
        return statistics.median(seconds)
    finally:
        step.close()


def time_all_reduce(group: Group, device: torch.device) -> list[tuple[int, float]]:
    """Time all-reduces in a group, of which every worker must take part. Returns bytes and median seconds of each."""
    found = []
    for size in (SMALL, LARGE):
        values = torch.zeros(size // 4, device=device)
        for _ in range(_WARM_UP):
            group.all_reduce(values, "timing")
        seconds = [_timed(lambda: group.all_reduce(values, "timing"), device) for _ in range(_EXCHANGES)]  # noqa: B023
        found.append((size, statistics.median(seconds)))
    return found


def _timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of an action, with what it left for a GPU to do."""
    _finish(device)
    begun = time.perf_counter()
    action()
    _finish(device)
    return time.perf_counter() - begun


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
