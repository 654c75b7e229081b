"""Measure the cost of a step beyond the network itself, and the gain of spreading on two cores.

    python benchmarks/step.py [--blocks 20] [--steps 5] [--out benchmarks/results/step.json]

Compares, in one run, block by block in turn (A B B A ...), so that a drift of the machine's speed favours neither side:
  overhead   RIDE-3 ResNet-32, batch 128, packed in one Ray actor with DeepSpeed, the driver's own loop, journal and
             MLflow upload running,
             against a bare PyTorch loop of the same model and loss on one batch in memory. Ours
             also draws and augments its images.
  spread     RIDE-2 ResNet-32, one worker with two threads against two workers with one thread each.
Only one side computes at a time. Printed and saved: milliseconds per step (median over blocks) and the ratio of
neighbouring blocks (median, lowest, highest).
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
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
from orchestration.storage.run_folder import RunFolder, versions
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
STEPS_PER_EPOCH = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=("overhead", "spread"))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "step.json"))
    options = parser.parse_args()
    start_local_ray()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        if options.only != "spread":
            results["overhead"] = overhead(folder, options)
        if options.only != "overhead":
            results["spread"] = spread(options)
        host = host_of(folder)
    ray.shutdown()
    record = {
        "command": f"python benchmarks/step.py --blocks {options.blocks} --steps {options.steps}",
        **host,
        **results,
    }
    Path(options.out).parent.mkdir(exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def overhead(folder: RunFolder, options: argparse.Namespace) -> dict[str, Any]:
    """Compare expertail, with everything switched on, with the bare loop."""
    words = [*COMMON, "engine.threads=2", "cluster.cpus_per_worker=1"]
    config = load_config(words)
    folder.write_config(config)
    folder.record_start(config, [], {})
    uploader = start_uploader(folder.path, default_uri(folder.path.parent), "benchmark", "step")
    fleet = Fleet(config, mesh_shape(config.method.num_experts, 1))
    fleet.start()
    run = Run(config, folder, Console(stream=io.StringIO()), StopSignals(), {})
    bare = ray.remote(BareLoop).options(num_cpus=0).remote(to_yaml(config), 2)
    with run.journal:
        stage = StageRun(run, "train", fleet, run.console)
        stage.prepare()
        result = in_turn(stage.take, lambda steps: ray.get(bare.run.remote(steps)), options)
    fleet.close()
    ray.kill(bare)
    uploader.finish(60)
    return {"a": "expertail: Ray + DeepSpeed + journal + MLflow", "b": "bare PyTorch loop", **result}


def spread(options: argparse.Namespace) -> dict[str, Any]:
    """Compare packed on two threads with spread on two workers."""
    packed_config = load_config([*COMMON, "method.num_experts=2", "engine.threads=2", "cluster.cpus_per_worker=0.5"])
    spread_config = load_config(
        [*COMMON, "method.num_experts=2", "engine.threads=1", "cluster.workers=2", "cluster.cpus_per_worker=0.5"]
    )
    fleets = []
    for config in (packed_config, spread_config):
        fleet = Fleet(config, mesh_shape(2, config.cluster.workers))
        fleet.start()
        fleet.build("train")
        fleets.append(fleet)
    result = in_turn(trained(fleets[1]), trained(fleets[0]), options)
    for fleet in fleets:
        fleet.close()
    return {"a": "spread: 2 workers x 1 thread", "b": "packed: 1 worker x 2 threads", **result}


def trained(fleet: Fleet) -> Callable[[int], None]:
    """Return a function that takes steps on a fleet; a call to the workers never crosses the end of an epoch."""
    done = 0

    def take(steps: int) -> None:
        nonlocal done
        target = done + steps
        while done < target:
            done_after = min(target, (done // STEPS_PER_EPOCH + 1) * STEPS_PER_EPOCH)
            fleet.call("train", done_after)
            done = done_after

    return take


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


def in_turn(a: Callable[[int], None], b: Callable[[int], None], options: argparse.Namespace) -> dict[str, Any]:
    """Time blocks of steps of two sides in turn, after one warm-up block each."""
    a(options.steps), b(options.steps)
    times: dict[str, list[float]] = {"a": [], "b": []}
    for block in range(options.blocks):
        for name, side in (("a", a), ("b", b)) if block % 2 else (("b", b), ("a", a)):
            start = time.perf_counter()
            side(options.steps)
            times[name].append((time.perf_counter() - start) / options.steps)
    ratios = [x / y for x, y in zip(times["a"], times["b"], strict=True)]
    return {
        "steps_each": options.blocks * options.steps,
        "a_ms": round(1000 * statistics.median(times["a"]), 1),
        "b_ms": round(1000 * statistics.median(times["b"]), 1),
        "a_images_per_s": round(128 / statistics.median(times["a"]), 1),
        "b_images_per_s": round(128 / statistics.median(times["b"]), 1),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_lowest": round(min(ratios), 4),
        "ratio_highest": round(max(ratios), 4),
    }


def host_of(folder: RunFolder) -> dict[str, Any]:
    """Return hardware and versions behind the numbers."""
    folder.record_start(load_config([]), [], {})
    run = folder.read_run()
    return {"host": run["host"], "versions": versions(), "commit": run["commit"]}


if __name__ == "__main__":
    main()
