"""Measure what the step of every loss and mixing costs, against cross-entropy with the same network.

    python -m benchmarks.loss_steps [--rounds 9] [--only ROW ...] [--beside "what else ran"] [--out FILE]

Each side is the product's own `StageTrainer`, in one process without Ray, on one thread: a ResNet-8 on made-up images
of the form of CIFAR-100-LT, batch 128. A small network is the hard case, as a loss costs the same whatever network it
judges. In each round a row and its baseline take one epoch each, in an order that changes. Printed and saved
(benchmarks/results/loss_steps.json): the median over rounds of the ratio of both, in time and in processor's time,
which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import write_images
from benchmarks.losses import LOSSES
from experts.data.dataset import open_dataset
from experts.ensemble import build_ensemble
from orchestration.config.compose import load_config
from orchestration.config.run_config import RunConfig
from orchestration.config.words import available
from orchestration.storage.exports import TrainingData, export_model
from orchestration.storage.run_folder import versions
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

RESULTS = Path(__file__).parent / "results" / "loss_steps.json"
COMMON = ("dataset=cifar100_lt", "dataset.max_per_class=30", "dataset.imbalance_ratio=10", "pace=fashion_mnist_lt",
          "protocol=small", "engine.name=torch", "engine.threads=1")  # fmt: skip
_TRAIN = "method.stages.train"
_CE = f"{_TRAIN}.objective.name=cross_entropy"
_COSINE = ("method=ce", "method.head={name: cosine, scale: 30}")


class Row(NamedTuple):
    """Two sides to compare: words and stage of a loss, and of cross-entropy.

    Attributes:
        words: of the loss, without those that all rows share.
        baseline: of cross-entropy with the same network.
        stage: the stage that is measured, of both.
        more: what the method does more than another loss, where it does.
    """

    words: tuple[str, ...]
    baseline: tuple[str, ...] = ("method=ce",)
    stage: str = "train"
    more: str = ""


def _then(stage: str, host: str = "ce") -> Row:
    words = (*LOSSES[host][:-1], f"then={stage}")
    return Row(words, (*words, f"method.stages.{stage}.objective.name=cross_entropy"), stage)


_ON = f"{_TRAIN}.class_weights.after_epoch=0"
ROWS: dict[str, Row] = {
    **{name: Row(LOSSES[name]) for name in (
        "weighted_softmax", "class_balanced", "class_balanced_sigmoid", "class_balanced_focal", "focal",
        "focal_sigmoid", "esql", "seesaw", "distribution_balanced", "balanced_softmax", "lade",
    )},
    "ce_drw": Row(("method=ce", f"{_TRAIN}.class_weights.rule=effective_number", _ON)),
    "ldam_drw": Row((*LOSSES["ldam_drw"], _ON), _COSINE),
    "robal": Row(LOSSES["robal"], (*LOSSES["robal"], _CE)),
    "ride": Row(("method=ride", f"{_TRAIN}.objective.reweight_epoch=0"), ("method=ride", _CE)),
    "dive": Row(LOSSES["dive"], more="a teacher's scores of every image"),
    "gcl_first_stage": Row(LOSSES["gcl"][:-1], (*LOSSES["gcl"][:-1], _CE)),
    "gcl": _then("gcl", "gcl"),
    "acsl": _then("acsl"),
    "las": _then("las"),
    "mislas": _then("mislas"),
    "gist_classifier": Row(("method=ce", "then=gist_classifier"), ("method=ce", "then=crt"), "",
                           more="the best of five directions for each class"),
    **{mix: Row(("method=ce", f"mix={mix}"), more="blended images, two losses")
       for mix in ("mixup", "remix", "cutmix", "cmo") if mix in available("mix")},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.loss_steps", *sys.argv[1:]]), "versions": versions(), "threads": 1,
        "load": [round(value, 2) for value in os.getloadavg()], "beside": options.beside, "rows": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), per_class=30, test=200)
        for name in options.only:
            record["rows"][name] = measured(ROWS[name], Path(folder), options.rounds)
            print(line(name, record["rows"][name]), flush=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


def measured(row: Row, folder: Path, rounds: int) -> dict[str, Any]:
    """Return milliseconds per step of a row and of its baseline, and the ratios of both in the same round."""
    sides = {"row": trainer(row.words, row.stage or "gist_classifier", folder),
             "baseline": trainer(row.baseline, row.stage or "crt", folder)}  # fmt: skip
    for side in sides.values():
        epoch(side)  # warm-up
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            took[name].append(epoch(sides[name]))
    found: dict[str, Any] = {"words": row.words, "baseline": row.baseline, "more": row.more}
    for at, kind in enumerate(("time", "cpu")):
        ms = {name: 1000 * statistics.median(pair[at] for pair in pairs) for name, pairs in took.items()}
        ratios = [own[at] / base[at] for own, base in zip(took["row"], took["baseline"], strict=True)]
        found[kind] = {
            **{f"{name}_ms": round(value, 2) for name, value in ms.items()},
            **{name: round(of(ratios), 4) for name, of in (("ratio", statistics.median), ("low", min), ("high", max))},
        }
    for side in sides.values():
        side.close()
    return found


def trainer(words: tuple[str, ...], stage: str, folder: Path) -> StageTrainer:
    """Return a trainer of a stage, from new weights, with untrained teachers."""
    config = load_config([*words, *COMMON, f"dataset.root={folder}", f"method.stages.{stage}.batch_size=128",
                          f"method.stages.{stage}.epochs=40"])  # fmt: skip
    dataset = open_dataset(config.dataset)
    teachers = {name: export(config, name, folder) for name in config.method.stages[stage].teachers}
    return StageTrainer(config, stage, dataset, Mesh(mesh_shape(config.method.num_experts, 1)), teachers)


def export(config: RunConfig, stage: str, folder: Path) -> str:
    """Write the network of a stage as it begins, for another stage to learn from; return its folder."""
    dataset = open_dataset(config.dataset)
    ensemble = config.ensemble(stage, dataset.num_classes)
    data = TrainingData(dataset=config.dataset, class_names=dataset.class_names, counts=dataset.counts_C.tolist(),
                        image_shape=(32, 32, 3))  # fmt: skip
    place = folder / f"{stage}.export"
    export_model(
        place, build_ensemble(ensemble, seed=1).state_dict(), ensemble, config.method.aggregator_in(stage), data
    )
    return str(place)


def epoch(side: StageTrainer) -> tuple[float, float]:
    """Take an epoch's steps; return the seconds and the processor's seconds of one."""
    steps = side.setup.steps_per_epoch
    time_s, cpu_s = time.perf_counter(), time.process_time()
    side.train(side.done + steps)
    return (time.perf_counter() - time_s) / steps, (time.process_time() - cpu_s) / steps


def line(name: str, found: dict[str, Any]) -> str:
    """Return a row of the table in docs/results.md."""
    ratios = [
        f"{found[kind]['ratio']:.2f} ({found[kind]['low']:.2f} to {found[kind]['high']:.2f})"
        for kind in ("time", "cpu")
    ]
    return f"| `{name}` | {found['time']['row_ms']:.0f} | {' | '.join(ratios)} | {found['more']} |"


if __name__ == "__main__":
    main()
