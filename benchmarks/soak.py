"""Train for half an hour under random kills of workers, and compare with the same steps undisturbed.

    python benchmarks/soak.py --minutes 30 --kill-every 60 [--standby 1] [--out benchmarks/results/soak.json]

The disturbed run is stopped by SIGTERM when its time is over; the calm one then takes as many steps. Watched meanwhile:
memory of the driver and of the workers, processes, open files of the driver, actors and placement groups that Ray
knows, files in the run folder. Passed means: weights equal byte by byte, memory of the second half no more than a tenth
above the first's, and nothing left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from orchestration.storage.run_folder import origin

WORDS = [
    "method=ride", "dataset=digits_lt", "dataset.image_size=16", "method.stages.train.batch_size=50",
    "method.stages.train.epochs=100000", "run.evaluate_every_epochs=50", "run.checkpoint_every_steps=50",
    "cluster.workers=2", "cluster.experts_per_worker=3", "cluster.cpus_per_worker=0.5", "engine.threads=1",
    "cluster.max_failures=20", "tracking.enabled=false", "run.pictures=false", "run.log_interval_s=60",
]  # fmt: skip
PERIOD_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kill-every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--standby", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the victims")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "soak.json"))
    options = parser.parse_args()
    if 60 * options.minutes < 4 * PERIOD_S:
        least = 4 * PERIOD_S / 60
        parser.error(f"--minutes {options.minutes:g}: needed {least:.2g} or more, because memory is compared by halves")
    from orchestration.cluster.local_ray import start_local_ray

    start_local_ray()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # workers of a failed run may still write
        runs = Path(scratch)
        record = train_under_kills(runs, options)
        with killed_at_end(start(runs, "calm", f"run.max_steps={record['steps']}")) as process:
            assert process.wait() == 0, (runs / "calm.log").read_text()
        record["weights_equal"] = weights(runs / "disturbed") == weights(runs / "calm")
        record["losses_equal"] = losses(runs / "disturbed") == losses(runs / "calm")
    record["passed"] = bool(
        record["weights_equal"]
        and record["losses_equal"]
        and not any(record["left"].values())
        and all(m["second_half"] <= 1.1 * m["first_half"] for m in record["memory_mib"].values())
    )
    record["command"] = (
        f"python benchmarks/soak.py --minutes {options.minutes:g} --kill-every {options.kill_every:g} "
        f"--standby {options.standby} --seed {options.seed}"
    )
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    sys.exit(not record["passed"])


def start(runs: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """Start a run on the Ray of this process; its output goes to a log beside its folder."""
    command = [sys.executable, "-m", "orchestration", "train", *WORDS, f"run.dir={runs}", f"run.name={name}", *words]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with open(runs / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


@contextlib.contextmanager
def killed_at_end(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kill a run's process at the end of the block if it still lives."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def train_under_kills(runs: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train the disturbed run and return what was observed."""
    before = ray_objects()
    with killed_at_end(start(runs, "disturbed", f"cluster.standby={options.standby}")) as process:
        kills, seen, workers_ever = kill_workers(process, runs, options)
    time.sleep(10)  # Ray removes actors and placement groups a little after the driver has ended
    found = run_json(runs / "disturbed")
    return {
        "minutes": options.minutes,
        "kills": kills,
        "standby": options.standby,
        **recoveries_of(found),
        "steps": max(losses(runs / "disturbed")),
        **summary_of(seen),
        "left": {
            "processes": [pid for pid in workers_ever if psutil.pid_exists(pid)],
            **{kind: sorted(names - before[kind]) for kind, names in ray_objects().items()},
            "half_written": [path.name for path in (runs / "disturbed" / "checkpoints").glob(".*")],
        },
        "hardware": origin(found)["hardware"],
    }


def kill_workers(
    process: subprocess.Popen[bytes], runs: Path, options: argparse.Namespace
) -> tuple[int, list[dict[str, float]], set[int]]:
    """Kill workers until the time is over, then stop the run. Returns the kills, the snapshots and the workers seen."""
    driver = psutil.Process(process.pid)
    folder, choose = runs / "disturbed", random.Random(options.seed)
    begun = time.monotonic()
    due, kills = options.kill_every, 0
    seen: list[dict[str, float]] = []
    workers_ever: set[int] = set()
    while (now := time.monotonic() - begun) < 60 * options.minutes:
        time.sleep(PERIOD_S)
        assert process.poll() is None, (runs / "disturbed.log").read_text()
        pids = [worker["pid"] for worker in run_json(folder).get("workers", [])]
        workers_ever.update(pids)
        seen.append(snapshot(driver, pids, folder))
        if now >= due and pids:
            due += options.kill_every
            victim = choose.choice(pids)
            if psutil.pid_exists(victim):
                os.kill(victim, signal.SIGKILL)
                kills += 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM, (runs / "disturbed.log").read_text()
    return kills, seen, workers_ever


def recoveries_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json records about lost workers; it has no such record if none was lost."""
    recoveries = found.get("recoveries", [])
    seconds = [recovery["seconds"]["total"] for recovery in recoveries]
    return {
        "failures": found.get("failures", 0),
        "steps_again": sum(recovery["steps_again"] for recovery in recoveries),
        "recovery_s": {"median": statistics.median(seconds), "most": max(seconds)} if seconds else None,
    }


def summary_of(seen: list[dict[str, float]]) -> dict[str, Any]:
    """Return memory by halves of the time, without the first snapshot; other counts after a quarter and at the end."""
    half = len(seen) // 2
    return {
        "memory_mib": {
            who: {
                "first_half": round(statistics.median(s[who] for s in seen[1:half])),
                "second_half": round(statistics.median(s[who] for s in seen[half:])),
            }
            for who in ("driver_mib", "workers_mib")
        },
        "driver_open_files": [seen[half // 2]["files"], seen[-1]["files"]],
        "driver_threads": [seen[half // 2]["threads"], seen[-1]["threads"]],
        "files_in_folder": [seen[half // 2]["in_folder"], seen[-1]["in_folder"]],
    }


def snapshot(driver: psutil.Process, workers: list[int], folder: Path) -> dict[str, float]:
    """Return memory, open files, threads and files in the folder as they are now; of the workers, the largest."""
    held = [memory for pid in workers if (memory := memory_mib(pid)) is not None]
    return {
        "driver_mib": driver.memory_info().rss / 2**20,
        "workers_mib": max(held, default=0),
        "files": driver.num_fds(),
        "threads": driver.num_threads(),
        "in_folder": sum(1 for _ in folder.rglob("*")),
    }


def memory_mib(pid: int) -> float | None:
    """Return the resident memory of a process, or None if it has ended."""
    try:
        return psutil.Process(pid).memory_info().rss / 2**20
    except psutil.Error:
        return None


def ray_objects() -> dict[str, set[str]]:
    """Return actors and placement groups that still exist."""
    from ray.util.placement_group import placement_group_table
    from ray.util.state import list_actors

    try:
        actors = {actor.actor_id for actor in list_actors(limit=10_000) if actor.state != "DEAD"}
    except Exception:  # the state API needs the dashboard, which our local Ray does not start
        from ray._private.state import actors as table

        actors = {key for key, actor in table().items() if actor["State"] != "DEAD"}
    groups = {key for key, group in placement_group_table().items() if group["state"] != "REMOVED"}
    return {"actors": actors, "placement_groups": groups}


def run_json(folder: Path) -> dict[str, Any]:
    """Return the contents of run.json, empty before it is written."""
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def losses(folder: Path) -> dict[int, float]:
    """Return the loss by step."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["value"] for r in records if r["name"] == "train/loss"}


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor file of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


if __name__ == "__main__":
    main()
