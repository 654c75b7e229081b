"""Measure the cost of a step beyond the network itself, what options gain, and the gain of spreading on two cores.

    python benchmarks/step.py [--blocks 20] [--steps 5] [--only SIDE ...] [--out benchmarks/results/step.json]

RIDE-3 on a ResNet-32, batch 128, two threads. All sides take blocks of steps in turn, in an order that changes from
round to round, so that a drift of the machine's speed favours none. Only one computes at a time.
  bare       a bare PyTorch loop of the same model and loss, on one batch in memory
  auto       expertail as it comes: a Ray actor, the driver's own loop, journal and MLflow upload; it also draws and
             augments its images
  deepspeed  the same with engine.name=deepspeed
  compiled   the same with engine.compile=true; compiling is not timed, but told
  autocast   the same with engine.precision=autocast
  packed, spread   RIDE-2: one worker with two threads, two workers with one thread each
Printed and saved: milliseconds per step (median over blocks), and the ratio to the bare loop's (to packed, for spread)
in the same round (median, lowest, highest).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from orchestration.cluster.fleet import Fleet
from orchestration.cluster.local_ray import start_local_ray
from orchestration.config.compose import load_config, to_yaml
from orchestration.runs.console import Console
from orchestration.runs.run import Run
from orchestration.runs.stage_run import StageRun
from orchestration.runs.stopping import StopSignals
from orchestration.storage.run_folder import RunFolder, origin
from orchestration.tracking.uploader import start_uploader
from orchestration.tracking.uri import default_uri
from orchestration.training.mesh import mesh_shape

COMMON = [
    "method=ride",
    "dataset=digits_lt",
    "backbone=resnet32",
    "dataset.imbalance_ratio=1",  # 1200 images: 9 whole batches per epoch
    "method.stages.train.batch_size=128",
    "method.stages.train.drop_last=true",
    "method.stages.train.epochs=1000",
    "run.evaluate_every_epochs=1000",
    "run.checkpoint_every_steps=100000",
]

SIDES = ("bare", "auto", "deepspeed", "compiled", "autocast", "packed", "spread")
WORDS = {
    "auto": ["engine.name=auto"],
    "deepspeed": ["engine.name=deepspeed"],
    "compiled": ["engine.compile=true"],
    "autocast": ["engine.precision=autocast"],
    "packed": ["method.num_experts=2"],
    "spread": ["method.num_experts=2", "cluster.workers=2", "cluster.cpus_per_worker=0.5"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "step.json"))
    options = parser.parse_args()
    start_local_ray()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as open_sides:
        sides = {name: open_sides.enter_context(side(name, Path(scratch))) for name in options.only}
        results = in_turn(sides, options)
        host = host_of(RunFolder(Path(scratch) / "host"))
    ray.shutdown()
    record = {"command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]), **host, **results}
    Path(options.out).parent.mkdir(exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(results, indent=1))


@contextlib.contextmanager
def side(name: str, scratch: Path) -> Iterator[Callable[[int], None]]:
    """Start a side, and yield the function that takes so many of its steps."""
    if name == "bare":
        bare = ray.remote(BareLoop).options(num_cpus=0).remote(to_yaml(load_config(COMMON)), 2)
        yield lambda steps: ray.get(bare.run.remote(steps))
        ray.kill(bare)
        return
    threads = 1 if name == "spread" else 2
    config = load_config([*COMMON, f"engine.threads={threads}", "cluster.cpus_per_worker=0.1", *WORDS[name]])
    folder = RunFolder(scratch / name)
    folder.write_config(config)
    folder.record_start(config, [], {})
    uploader = start_uploader(folder.path, default_uri(folder.path.parent), "benchmark", name)
    fleet = Fleet(config, mesh_shape(config.method.num_experts, config.cluster.workers))
    fleet.start()
    run = Run(config, folder, Console(stream=io.StringIO()), StopSignals(), {})
    with run.journal:
        stage = StageRun(run, "train", fleet, run.console)
        stage.prepare()
        yield stage.take
    fleet.close()
    uploader.finish(60)


class BareLoop:
    """The least code that trains the same network: model, loss, SGD, one batch kept in memory."""

    def __init__(self, yaml: str, threads: int) -> None:
        import os

        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch
        from omegaconf import OmegaConf

        from experts.ensemble import EnsembleConfig, build_ensemble
        from experts.progress import Progress
        from experts.registry import build
        from orchestration.config.problems import check

        config = check(OmegaConf.to_container(OmegaConf.create(yaml)), "benchmark")  # type: ignore[arg-type]
        self.threads = threads
        self.images = torch.rand(128, 3, 32, 32)
        self.labels = torch.arange(128) % 10
        self.progress = Progress(1, 1)
        self.model = build_ensemble(
            EnsembleConfig(
                config.backbone,
                config.method.head,
                num_classes=10,
                expert_names=config.method.expert_names,
                reduce_dimension=True,
            ),
            seed=0,
        ).train()
        counts_C = torch.full((10,), 120)
        self.objective = build(
            "objective", config.method.stages["train"].objective, counts_C, config.method.num_experts
        )
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def run(self, steps: int) -> None:
        """Take some steps."""
        import torch

        from experts.objective import StepContext

        torch.set_num_threads(self.threads)
        for _ in range(steps):
            now = StepContext(self.objective.denominators(self.labels, self.progress), self.progress)
            loss, _ = self.objective(self.model(self.images), self.labels, now)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            loss.item()  # as ours, which records every loss


def in_turn(sides: dict[str, Callable[[int], None]], options: argparse.Namespace) -> dict[str, Any]:
    """Time blocks of steps of all sides in turn, after a block each that is not counted."""
    first_block_s = {name: timed(take, options.steps) * options.steps for name, take in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for block in range(options.blocks):
        turned = names[block % len(names) :] + names[: block % len(names)]
        for name in turned if block % 2 else reversed(turned):
            times[name].append(timed(sides[name], options.steps))
    found = {}
    for name, own in times.items():
        entry = {"ms": round(1000 * statistics.median(own), 1), "first_block_s": round(first_block_s[name], 1)}
        entry["images_per_s"] = round(128 / statistics.median(own), 1)
        reference = {"packed": None, "spread": "packed", "bare": None}.get(name, "bare")
        if reference in times:
            ratios = [x / y for x, y in zip(own, times[reference], strict=True)]
            entry |= {f"ratio_to_{reference}": round(statistics.median(ratios), 4)}
            entry |= {"lowest": round(min(ratios), 4), "highest": round(max(ratios), 4)}
        found[name] = entry
    return {"steps_each": options.blocks * options.steps, **found}


def timed(take: Callable[[int], None], steps: int) -> float:
    """Return the seconds that a step takes."""
    start = time.perf_counter()
    take(steps)
    return (time.perf_counter() - start) / steps


def host_of(folder: RunFolder) -> dict[str, Any]:
    """Return hardware and versions behind the numbers."""
    folder.record_start(load_config([]), [], {})
    run = folder.read_run()
    return origin(run)


if __name__ == "__main__":
    main()
