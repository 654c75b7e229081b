"""Measure a study: 12 runs of digits side by side, one after another, and as single commands; then many runs of a step.

    python benchmarks/studies.py [--singles 12] [--many 200] [--out benchmarks/results/studies.json]

Seconds of a watch, from the start of the process to its end, with tracking and pictures as by default. `singles` may be
fewer than 12: their mean is multiplied. Of many runs of one step: seconds per run after the first ten, and memory of
the study's process (MiB) after ten runs and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from orchestration.storage.files import read_json
from orchestration.storage.run_folder import origin

RECIPES, SEEDS = ["ce", "ldam", "ride"], [0, 1, 2, 3]
WORDS = [
    "dataset=digits_lt", "dataset.image_size=16", "method.stages.train.batch_size=50", "method.stages.train.epochs=12",
]  # fmt: skip
ONE_STEP = ["dataset=digits_lt", "dataset.image_size=8", "method=ce", "method.stages.train.batch_size=405"]
ONE_STEP += ["method.stages.train.epochs=1", "run.pictures=false", "method.stages.train.lr_schedule.milestones=[]"]


def command(*words: str) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "orchestration", *words], env=environment, **quiet)


def seconds(*words: str) -> float:
    begun = time.monotonic()
    code = command(*words).wait()
    assert code == 0, f"{words} ended with {code}"
    return round(time.monotonic() - begun, 1)


def twelve(scratch: str, singles: int) -> dict[str, object]:
    study = ["study", f"method={','.join(RECIPES)}", f"seed={','.join(map(str, SEEDS))}", *WORDS]
    beside = seconds(*study, f"run.dir={scratch}/beside", "study.name=s")
    after = seconds(*study, f"run.dir={scratch}/after", "study.name=s", "study.parallel=1")
    runs = [(recipe, seed) for seed in SEEDS for recipe in RECIPES][:singles]
    each = [
        seconds(
            "train", f"method={recipe}", f"seed={seed}", *WORDS, "cluster.cpus_per_worker=1", f"run.dir={scratch}/one"
        )
        for recipe, seed in runs
    ]
    single = statistics.mean(each) * 12
    return {
        "side_by_side_s": beside,
        "one_after_another_s": after,
        "single_commands_s": round(single, 1),
        "single_commands_measured": len(each),
        "times_as_fast_as_one_after_another": round(after / beside, 2),
        "times_as_fast_as_single_commands": round(single / beside, 2),
    }


def many(scratch: str, count: int) -> dict[str, object]:
    words = ["study", f"seed=range(0,{count})", *ONE_STEP, f"run.dir={scratch}/many", "study.name=s"]
    process, memory = command(*words), []
    own, ended = psutil.Process(process.pid), 0
    while process.poll() is None:
        points = read_json(Path(scratch) / "many" / "s" / "study.json").get("points", [])
        now = sum(point["status"] == "finished" for point in points)
        if now > ended:
            ended = now
            memory.append((now, own.memory_info().rss / 2**20))
        time.sleep(0.1)
    assert process.returncode == 0
    times = sorted(read_json(path)["ended"] for path in Path(scratch).glob("many/s/*/run.json"))
    first = next(held for done, held in memory if done >= min(10, count))
    return {
        "runs": count,
        "seconds_per_run": round((times[-1] - times[min(10, count) - 1]) / max(1, count - 10), 2),
        "memory_after_ten_mib": round(first),
        "memory_at_the_end_mib": round(memory[-1][1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--singles", type=int, default=12)
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "studies.json"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        results: dict[str, object] = {"load_at_the_start": round(load, 1), "cores": psutil.cpu_count()}
        if options.singles:
            results["twelve_runs"] = twelve(scratch, options.singles)
        if options.many:
            results["runs_of_one_step"] = many(scratch, options.many)
        record = read_json(next(Path(scratch).glob("*/*/*/run.json")))
    asked = f"python benchmarks/studies.py --singles {options.singles} --many {options.many}"
    Path(options.out).write_text(json.dumps({"command": asked, **origin(record), **results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
