"""Measure whether the ensemble of `make demo` leads its best expert: the demo's own command, three seeds.

    python benchmarks/demo.py [--seeds 0,1,2] [--runs runs/benchmark_demo] [--out benchmarks/results/demo.json]

Writes the top-1 accuracy of the ensemble and of every expert, last and best epoch, by group of classes, with hardware
and versions; prints a table. A finished run is not repeated. The best expert is chosen on the test images themselves,
which flatters it: the lead over an expert chosen beforehand is larger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from orchestration.storage.run_folder import origin

WORDS = ["method=ride", "dataset=digits_lt", "pace=demo"]
GROUPS = ("all", "many", "medium", "few")
OUT = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_demo"))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    folders = {int(seed): train(int(seed), options.runs) for seed in options.seeds.split(",")}
    record = summary(folders)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["seeds"]))


def train(seed: int, runs: Path) -> Path:
    """Train one run, unless it is finished already. Returns its folder."""
    words = [*WORDS, f"seed={seed}", f"run.dir={runs}", f"run.name=demo-s{seed}"]
    subprocess.run([sys.executable, "-m", "orchestration", "train", *words], check=True, stdout=subprocess.DEVNULL)
    return runs / f"demo-s{seed}"


def summary(folders: dict[int, Path]) -> dict[str, Any]:
    """Return accuracies in percent by seed, epoch and member, the ensemble's leads, hardware and versions."""
    seeds = {str(seed): of_run(folder) for seed, folder in folders.items()}
    first = next(iter(folders.values()))
    run = json.loads((first / "run.json").read_text())
    config = yaml.safe_load((first / "config.yaml").read_text())
    leads = {which: [found[which]["lead"] for found in seeds.values()] for which in ("last", "best")}
    return {
        "command": f"expertail train {' '.join(WORDS)} seed=<seed>",
        **origin(run),
        "epochs": config["method"]["stages"]["train"]["epochs"],
        "threads": config["engine"]["threads"],
        "lead": {which: {"mean": round(statistics.mean(found), 2), "seeds": found} for which, found in leads.items()},
        "seeds": seeds,
    }


def of_run(folder: Path) -> dict[str, Any]:
    """Return one run's accuracies; `lead` is the ensemble's over its best expert, all classes, in percentage points."""
    found: dict[str, Any] = {}
    for which in ("last", "best"):
        members = json.loads((folder / "evaluation" / f"{which}.json").read_text())["members"]
        top1 = {name: {g: round(100 * m["top1"][g], 2) for g in GROUPS} for name, m in members.items()}
        best_expert = max(by_group["all"] for name, by_group in top1.items() if name != "ensemble")
        found[which] = {"lead": round(top1["ensemble"]["all"] - best_expert, 2), "top1": top1}

    times = [json.loads(line)["time"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found | {"training_s": round(times[-1] - times[0], 1)}


def table(seeds: dict[str, Any]) -> str:
    """Return a row per seed, epoch and member."""
    rows = [f"{'seed':>4}  {'':4}  {'member':<9}" + "".join(f"{group:>8}" for group in GROUPS)]
    for seed, found in seeds.items():
        for which in ("last", "best"):
            for member, top1 in found[which]["top1"].items():
                numbers = "".join(f"{top1[group]:8.1f}" for group in GROUPS)
                rows.append(f"{seed:>4}  {which:4}  {member:<9}{numbers}")
            rows.append(f"{seed:>4}  {which:4}  the ensemble leads by {found[which]['lead']:+.1f}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
