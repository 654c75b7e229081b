"""Measure a step of a second stage that trains heads alone against a step of the whole network.

    python benchmarks/second_stage.py [--blocks 15] [--steps 5] [--out benchmarks/results/second_stage.json]

Three sides take steps of 128 images, block by block in turn, so that a drift of the machine's speed favours none:
  whole      the first stage: trunk, features and heads learn
  augmented  cRT on augmented images: the trunk runs without a graph, heads learn
  kept       cRT without augmentation and with BatchNorm's statistics at rest: features were computed once
For one expert (cross-entropy) and three (RIDE) on a ResNet-32 at 32 x 32 pixels, plain PyTorch engine. Printed and
saved: milliseconds per step (median, lowest, highest block), the seconds of computing all features, and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from experts.data.dataset import open_dataset
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

COMMON = [
    "dataset=digits_lt",
    "backbone=resnet32",
    "dataset.imbalance_ratio=1",  # 1,200 images
    "engine.name=torch",
    "then=crt",
    "method.stages.train.batch_size=128",
    "method.stages.crt.batch_size=128",
    "method.stages.train.epochs=1000",
    "method.stages.crt.epochs=1000",
]
FIXED_FEATURES = [
    "dataset.augment.crop_padding=0",
    "dataset.augment.rotation=0",
    "method.stages.crt.frozen_batchnorm=eval",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "second_stage.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for method in ("ce", "ride"):
        found[method] = measured(method, options.blocks, options.steps)
        print(method, json.dumps(found[method], indent=1))
    Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


def measured(method: str, blocks: int, steps: int) -> dict[str, Any]:
    """Return milliseconds per step of each side, and ratios."""
    words = [f"method={method}", *COMMON]
    sides = {
        "whole": _trainer(words, "train"),
        "augmented": _trainer(words, "crt"),
        "kept": _trainer([*words, *FIXED_FEATURES], "crt"),
    }
    first = {name: _timed(trainer, 1) for name, trainer in sides.items()}  # warm-up; "kept" computes its features
    took: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(blocks):
        names = list(sides)[:: 1 if block % 2 else -1]
        for name in names:
            took[name].append(1000 * _timed(sides[name], steps) / steps)
    medians = {name: statistics.median(values) for name, values in took.items()}
    return {
        "ms": {name: [round(f(values), 2) for f in (statistics.median, min, max)] for name, values in took.items()},
        "features_s": round(first["kept"] - medians["kept"] / 1000, 3),
        "whole / augmented": round(medians["whole"] / medians["augmented"], 2),
        "whole / kept": round(medians["whole"] / medians["kept"], 1),
    }


def _trainer(words: list[str], stage: str) -> StageTrainer:
    config = load_config(words)
    shape = mesh_shape(config.method.num_experts, 1)
    return StageTrainer(config, stage, open_dataset(config.dataset), Mesh(shape))


def _timed(trainer: StageTrainer, steps: int) -> float:
    """Take steps, over the ends of epochs; return the seconds."""
    begun = time.perf_counter()
    left = steps
    while left:
        per_epoch = trainer.setup.steps_per_epoch
        now = min(left, per_epoch - trainer.done % per_epoch)
        trainer.train(trainer.done + now)
        left -= now
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
