"""Measure what an epoch costs beyond its steps and beyond the network: evaluation, journal and checkpoint.

    python benchmarks/epoch.py [--rounds 9] [--threads 2] [--out [benchmarks/results/epoch.json]]

The parts of an evaluation of 10,000 images of 100 classes by RIDE-3, in batches of 256, from logits that are there
already; and of a checkpoint of RIDE-3 on a ResNet-32, momentum included:
  prepare     scores of the rule and the experts in float64, log-probabilities, predictions
  scores      top-1, confidence and negative log-likelihood of four members
  diversity   main predictions and divergences of three experts
  state       everything per image brought together, as arrays
  transfer    copied, as on the way to the driver
  merge       taken in by the driver
  result      means over images, classes and groups, calibration
  journal     lines of all numbers, written
  checkpoint  what training waits for: a copy of weights and momentum in host memory
Printed, and with --out saved: milliseconds of each part and of all (median over rounds), lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from aggregation.aggregator import MeanLogits, Outputs
from aggregation.diversity import Diversity
from aggregation.metrics import Scores
from aggregation.per_image import MemberScores, read
from experts.data.dataset import open_dataset
from orchestration.config.compose import load_config
from orchestration.runs.stage_run import metrics_of
from orchestration.storage.journal import Journal
from orchestration.storage.run_folder import RunFolder, origin
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

IMAGES, CLASSES, BATCH = 10_000, 100, 256
NAMES = ("expert0", "expert1", "expert2")
COUNTS = np.round(500 * 0.01 ** (np.arange(CLASSES) / (CLASSES - 1))).astype(int).tolist()
RESULTS = Path(__file__).parent / "results" / "epoch.json"
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", nargs="?", const=str(RESULTS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, batches = trained(), drawn()
        with Journal(scratch) as journal:
            rounds = [one_epoch(batches, journal, trainer) for _ in range(options.rounds + 1)][1:]  # one to warm up
        trainer.close()
        found = {name: summary([took[name] for took in rounds]) for name in rounds[0]}
        found["all"] = summary([sum(took.values()) for took in rounds])
        print("\n".join(f"{name:10s} {ms['median']:7.2f} ms" for name, ms in found.items()))
        if options.out:
            folder = RunFolder(Path(scratch) / "host")
            folder.record_start(load_config([]), [], {})
            command = " ".join(["python", "benchmarks/epoch.py", *sys.argv[1:]])
            record = {"command": command, "threads": options.threads, **host_of(folder), "ms": found}
            Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


def drawn() -> list[tuple[Tensor, Tensor]]:
    """Return batches of logits [3, B, C] of experts that are right more often than not, and of labels."""
    draws = torch.Generator().manual_seed(0)
    labels_N = torch.arange(IMAGES) % CLASSES
    logits_ENC = 2 * torch.randn(len(NAMES), IMAGES, CLASSES, generator=draws)
    logits_ENC[:, torch.arange(IMAGES), labels_N] += 4
    return [(z.contiguous(), y) for z, y in zip(logits_ENC.split(BATCH, dim=1), labels_N.split(BATCH), strict=True)]


def trained() -> StageTrainer:
    """Return a trainer that has taken a step, so that there is momentum."""
    config = load_config(["method=ride", "dataset=digits_lt", "backbone=resnet32"])
    trainer = StageTrainer(config, "train", open_dataset(config.dataset), Mesh(mesh_shape(len(NAMES), 1)))
    trainer.train(1)
    return trainer


def one_epoch(batches: list[tuple[Tensor, Tensor]], journal: Journal, trainer: StageTrainer) -> dict[str, float]:
    """Return the milliseconds of each part."""
    took: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        found = work()
        took[name] = took.get(name, 0.0) + 1000 * (time.perf_counter() - start)
        return found

    rule = MeanLogits(MeanLogits.Config(), torch.tensor(COUNTS), NAMES)
    scores, diversity = Scores(), Diversity()
    for logits_EBC, labels_B in batches:
        members = timed("prepare", lambda z=logits_EBC: _members(rule, z))
        timed("scores", lambda m=members, y=labels_B: scores.add(m, y))
        timed("diversity", lambda m=members, y=labels_B: diversity.add(m.only(NAMES), y))
    states = timed("state", lambda: _states(scores, diversity))
    states = timed("transfer", lambda: _sent(states))
    whole = timed("merge", lambda: _merged(*states))
    result = timed("result", lambda: _result(*whole))
    timed("journal", lambda: _write(journal, result))
    timed("checkpoint", trainer.take_snapshot)
    return took


def _members(rule: MeanLogits, logits_EBC: Tensor) -> MemberScores:
    members = rule.members(Outputs(logits_EBC))
    return MemberScores.stacked({**members, **dict(zip(NAMES, logits_EBC.unbind(), strict=True))})


def _states(scores: Scores, diversity: Diversity) -> tuple[Any, Any]:
    read([scores, diversity])
    return scores.state(), diversity.state()


def _sent(states: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return a copy of all arrays, which is what their way through shared memory costs."""
    scores, diversity = ({name: array.copy() for name, array in state.items()} for state in states)
    return scores, diversity


def _merged(scores: Any, diversity: Any) -> tuple[Scores, Diversity]:
    whole = Scores(), Diversity()
    whole[0].merge(Scores.from_state(scores))
    whole[1].merge(Diversity.from_state(diversity))
    return whole


def _result(scores: Scores, diversity: Diversity) -> dict[str, Any]:
    cuts = (36, 71)
    return scores.result(COUNTS, cuts) | {"diversity": diversity.result(COUNTS, cuts)}


def _write(journal: Journal, result: dict[str, Any]) -> None:
    journal.append("train", 1, 1, metrics_of("test", result))
    journal.flush()


def summary(ms: list[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest."""
    return {name: round(f(ms), 2) for name, f in (("median", statistics.median), ("lowest", min), ("highest", max))}


def host_of(folder: RunFolder) -> dict[str, Any]:
    """Return hardware and versions behind the numbers."""
    run = folder.read_run()
    return origin(run)


if __name__ == "__main__":
    main()
