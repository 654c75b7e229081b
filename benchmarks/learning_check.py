"""Does RIDE beat one expert where images are few? Fashion-MNIST-LT, three seeds, one schedule for both.

    python benchmarks/learning_check.py --root <folder of the four .gz files>

Runs `expertail train` for every method and seed (a finished run is not repeated), one thread each, and writes mean and
standard deviation over seeds, last and best epoch, to benchmarks/results/learning_check.json and as a table to standard
output. 1000 images of the largest class and ratio 100 make 5 many-, 3 medium- and 2 few-shot classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from orchestration.storage.run_folder import origin

METHODS = ("ce", "ride")
GROUPS = ("all", "many", "medium", "few", "many_by_index", "medium_by_index", "few_by_index")
COMMON = ("dataset=fashion_mnist_lt", "dataset.max_per_class=1000", "engine.threads=1", "run.evaluate_every_epochs=10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--runs", default="runs/learning_check")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    results = {}
    for method in options.methods.split(","):
        seeds = [int(seed) for seed in options.seeds.split(",")]
        folders = [run(method, seed, options) for seed in seeds]
        results[method] = {which: summary(folders, which) for which in ("last", "best")} | {
            "seeds": seeds,
            "command": f"expertail train method={method} {' '.join(COMMON)} seed=<seed> dataset.root=<folder>",
            "parameters": parameters(folders[0]),
            "seconds": [seconds(folder) for folder in folders],
        }

    run_record = json.loads((folders[0] / "run.json").read_text())
    record = origin(run_record) | {"results": results}
    path = Path(__file__).parent / "results" / "learning_check.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))


def command(method: str, seed: int, root: str, runs: str) -> list[str]:
    words = [f"method={method}", *COMMON, f"seed={seed}", f"dataset.root={root}", f"run.dir={runs}"]
    return [sys.executable, "-m", "orchestration", "train", *words]


def run(method: str, seed: int, options: argparse.Namespace) -> Path:
    """Train one run, unless it is finished already. Returns its folder."""
    subprocess.run(command(method, seed, options.root, options.runs), check=True, stdout=subprocess.DEVNULL)
    return Path(options.runs) / f"{method}-fashion_mnist_lt-s{seed}"


def summary(folders: list[Path], which: str) -> dict[str, list[float]]:
    """Return mean and standard deviation over seeds of the ensemble's top-1, in percent, by group."""
    found = [json.loads((folder / "evaluation" / f"{which}.json").read_text()) for folder in folders]
    values = {}
    for group in GROUPS:
        top1 = [100 * e["members"]["ensemble"]["top1"][group] for e in found]
        values[group] = [round(statistics.mean(top1), 2), round(statistics.stdev(top1), 2) if len(top1) > 1 else 0.0]
    return values


def parameters(folder: Path) -> int:
    """Return the number of parameters of a run's last model; BatchNorm's statistics are none."""
    from safetensors import safe_open

    with safe_open(folder / "export" / "last" / "model.safetensors", "pt") as tensors:
        names = [n for n in tensors.keys() if "running_" not in n and "num_batches" not in n]  # noqa: SIM118
        return sum(tensors.get_tensor(name).numel() for name in names)


def seconds(folder: Path) -> float:
    """Return the training time in seconds, from the first recorded step to the last."""
    run_record = json.loads((folder / "run.json").read_text())
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    times = [line["time"] for line in lines if line["name"] == "train/loss"]
    assert run_record["status"] == "finished"
    return round(times[-1] - times[0], 1)


def table(results: dict) -> str:
    """Return a Markdown table of means and standard deviations."""
    rows = ["| method | epoch | all | many | medium | few |", "|---|---|---|---|---|---|"]
    for method, found in results.items():
        for which in ("last", "best"):
            cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in (found[which][g] for g in GROUPS[:4])]
            rows.append(f"| {method} | {which} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
