"""Losses by classifiers, as Table 7 of the survey has them, on Fashion-MNIST-LT: three seeds, mean and spread.

    python benchmarks/classifiers.py --root <folder of the four .gz files> [--side-by-side 2]

One run per loss and seed trains the network once, 40 epochs of a ResNet-8, and then every classifier on it: joint (as
it is), NCM, cRT, LWS and tau-norm, whose tau is chosen on 50 validation images a class. LDAM's cosine head has no norms
for tau-norm to divide by. A finished run is not repeated. 1,000 images of the largest class and ratio 100 make 5 many-,
3 medium- and 2 few-shot classes. Writes benchmarks/results/classifiers.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CLASSIFIERS = ("joint", "ncm", "crt", "lws", "tau_norm")
LOSSES = {"ce": CLASSIFIERS, "ldam": CLASSIFIERS[:-1], "logit_adjustment": CLASSIFIERS}
GROUPS = ("many", "medium", "few", "all")
COMMON = (
    "dataset=fashion_mnist_lt",
    "dataset.max_per_class=1000",
    "dataset.val_per_class=50",
    "engine.threads=1",
    "cluster.cpus_per_worker=1",
    "run.evaluate_every_epochs=5",
    "tracking.enabled=false",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--runs", default="runs/classifiers")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--side-by-side", type=int, default=1)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    todo = [(loss, seed) for seed in seeds for loss in LOSSES]
    with ThreadPoolExecutor(options.side_by_side) as threads:
        list(threads.map(lambda one: run(*one, options.root, options.runs), todo))

    results: dict[str, Any] = {}
    for loss, classifiers in LOSSES.items():
        folders = [folder_of(loss, seed, options.runs) for seed in seeds]
        results[loss] = {classifier: summary(folders, classifier) for classifier in classifiers}
        chosen = [fitted(folder) for folder in folders] if "tau_norm" in classifiers else None
        results[loss] |= {"chosen tau": chosen} if chosen else {}
    record = json.loads((folder_of("ce", seeds[0], options.runs) / "run.json").read_text())
    kept = {key: record[key] for key in ("host", "versions", "commit")}
    path = Path(__file__).parent / "results" / "classifiers.json"
    path.write_text(json.dumps(kept | {"seeds": seeds, "words": COMMON, "results": results}, indent=1) + "\n")
    print(table(results))


def run(loss: str, seed: int, root: str, runs: str) -> None:
    """Train one run, unless it is finished already."""
    parts = f"then=[{','.join(LOSSES[loss])}]"
    name = folder_of(loss, seed, runs).name
    words = [f"method={loss}", parts, *COMMON, f"seed={seed}", f"dataset.root={root}", f"run.dir={runs}"]
    command = [sys.executable, "-m", "orchestration", "train", *words, f"run.name={name}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def folder_of(loss: str, seed: int, runs: str) -> Path:
    return Path(runs) / f"{loss}-s{seed}"


def summary(folders: list[Path], classifier: str) -> dict[str, list[float]]:
    """Return mean and standard deviation over seeds of the last top-1, in percent, by group."""
    found = [json.loads((folder / "evaluation" / classifier / "last.json").read_text()) for folder in folders]
    values = {}
    for group in GROUPS:
        top1 = [100 * evaluation["members"]["ensemble"]["top1"][group] for evaluation in found]
        values[group] = [round(statistics.mean(top1), 2), round(statistics.stdev(top1), 2) if len(top1) > 1 else 0.0]
    return values


def fitted(folder: Path) -> float:
    """Return the tau that a run chose on its validation images."""
    evaluation = json.loads((folder / "evaluation" / "tau_norm" / "last.json").read_text())
    return float(evaluation["fitted"]["choices"][0]["value"])


def table(results: dict[str, Any]) -> str:
    """Return the table as Markdown: a row per loss and classifier, mean +- standard deviation over seeds."""
    lines = ["| loss | classifier | many | medium | few | all |", "|---|---|---|---|---|---|"]
    for loss, by_classifier in results.items():
        for classifier in CLASSIFIERS:
            if classifier in by_classifier:
                cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in by_classifier[classifier].values()]
                lines.append(f"| {loss} | {classifier} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
