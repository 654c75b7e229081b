"""Measure the time from command to first step, packed and spread over three workers, with its breakdown.

    python benchmarks/startup.py [--rounds 3] [--out benchmarks/results/startup.json]

Runs `expertail train run.max_steps=1` in fresh folders, packed and spread in turn, and reads run.json. Seconds, median:
  command    from the start of the process to the command
  config     to a checked config (libraries load while Ray starts)
  ray        to a Ray that answers
  libraries  to workers that have imported torch and DeepSpeed
  built      to data, model and engines
  first_step to the first step done
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestration.storage.run_folder import origin

PLACEMENTS = {"packed": [], "spread over 3": ["cluster.workers=3"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "startup.json"))
    options = parser.parse_args()
    seen: dict[str, list[dict]] = {name: [] for name in PLACEMENTS}
    with tempfile.TemporaryDirectory() as scratch:
        for round_number in range(options.rounds):
            for name, words in PLACEMENTS.items():
                folder = f"{name.split()[0]}{round_number}"
                command = ["train", "run.max_steps=1", f"run.dir={scratch}", f"run.name={folder}", *words]
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                subprocess.run([sys.executable, "-m", "orchestration", *command], check=True, **quiet)
                record = json.loads((Path(scratch) / folder / "run.json").read_text())
                seen[name].append(record["startup_s"])

    results = {
        name: {part: round(statistics.median(s[part] for s in spans), 2) for part in spans[0]}
        for name, spans in seen.items()
    }
    out = {"command": f"python benchmarks/startup.py --rounds {options.rounds}", **origin(record), "seconds": results}
    Path(options.out).parent.mkdir(exist_ok=True)
    Path(options.out).write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
