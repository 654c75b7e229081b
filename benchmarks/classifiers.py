"""Losses by classifiers, as Table 7 of the survey has them, on Fashion-MNIST-LT: three seeds, mean and spread.

    python -m benchmarks.classifiers --root <folder of the four .gz files> [--side-by-side 2]

One run per loss and seed trains the network once, 40 epochs of a ResNet-8, and then every classifier on it: joint (as
it is), NCM, cRT, LWS and tau-norm, whose tau is chosen on 50 validation images a class. LDAM's cosine head has no norms
for tau-norm to divide by. A finished run is not repeated. 1,000 images of the largest class and ratio 100 make 5 many-,
3 medium- and 2 few-shot classes. Writes benchmarks/results/classifiers.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import seeds
from benchmarks.seeds import Job, mean_and_spread

CLASSIFIERS = ("joint", "ncm", "crt", "lws", "tau_norm")
LOSSES = {"ce": CLASSIFIERS, "ldam": CLASSIFIERS[:-1], "logit_adjustment": CLASSIFIERS}
GROUPS = ("many", "medium", "few", "all")
COMMON = (
    "dataset=fashion_mnist_lt",
    "dataset.max_per_class=1000",
    "dataset.val_per_class=50",
    "run.evaluate_every_epochs=5",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/classifiers"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--side-by-side", type=int, default=1)
    options = parser.parse_args()
    numbers = [int(seed) for seed in options.seeds.split(",")]
    jobs = [job(loss, seed, options.root) for seed in numbers for loss in LOSSES]
    seeds.train_all(options.runs.absolute(), jobs, options.side_by_side)

    results: dict[str, Any] = {}
    for loss, classifiers in LOSSES.items():
        folders = [options.runs / name_of(loss, seed) for seed in numbers]
        results[loss] = {classifier: summary(folders, classifier) for classifier in classifiers}
        chosen = [fitted(folder) for folder in folders] if "tau_norm" in classifiers else None
        results[loss] |= {"chosen tau": chosen} if chosen else {}
    kept = seeds.made_by(options.runs / name_of("ce", numbers[0]))
    path = Path(__file__).parent / "results" / "classifiers.json"
    words = (*COMMON, *seeds.ONE_THREAD)
    path.write_text(json.dumps(kept | {"seeds": numbers, "words": words, "results": results}, indent=1) + "\n")
    print(table(results))


def job(loss: str, seed: int, root: str) -> Job:
    """Return the run of a loss and all its classifiers."""
    words = (f"method={loss}", f"then=[{','.join(LOSSES[loss])}]", *COMMON, f"seed={seed}")
    return Job(name_of(loss, seed), (*words, f"dataset.root={Path(root).absolute()}"))


def name_of(loss: str, seed: int) -> str:
    return f"{loss}-s{seed}"


def summary(folders: list[Path], classifier: str) -> dict[str, list[float | None]]:
    """Return mean and standard deviation over seeds of the last top-1, in percent, by group."""
    top1 = seeds.accuracies(seeds.evaluation(folder, classifier) for folder in folders)
    both = {group: mean_and_spread(top1[group]) for group in GROUPS}
    return {group: [None if value is None else round(100 * value, 2) for value in pair] for group, pair in both.items()}


def fitted(folder: Path) -> float:
    """Return the tau that a run chose on its validation images."""
    return float(seeds.evaluation(folder, "tau_norm")["fitted"]["choices"][0]["value"])


def table(results: dict[str, Any]) -> str:
    """Return the table as Markdown: a row per loss and classifier, mean +- standard deviation over seeds."""
    lines = ["| loss | classifier | many | medium | few | all |", "|---|---|---|---|---|---|"]
    for loss, by_classifier in results.items():
        for classifier in CLASSIFIERS:
            if classifier in by_classifier:
                pairs = by_classifier[classifier].values()
                cells = [seeds.percent(*(None if value is None else value / 100 for value in pair)) for pair in pairs]
                lines.append(f"| {loss} | {classifier} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
