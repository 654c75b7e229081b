"""Small runs of the real program, and what is compared of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestration.cli import main

# 405 digits at 16 x 16 in batches of 50: 9 steps an epoch, the last with 5 images; 27 steps in all, some seconds.
SMALL = [
    "dataset.image_size=16",
    "method.stages.train.batch_size=50",
    "method.stages.train.epochs=3",
    "engine.threads=1",
    "run.checkpoint_every_steps=4",
    "run.log_interval_s=0.5",
    "tracking.enabled=false",
    "run.pictures=false",
]
# 180 steps, some ten seconds: not over before a fault is noticed.
LONG = [
    *(word for word in SMALL if "epochs" not in word),
    "method.stages.train.epochs=20",
    "run.evaluate_every_epochs=10",
]


def train(folder: Path, *words: str, common: Sequence[str] = SMALL) -> int:
    """`expertail train` in this process; the run is `folder`."""
    return main(["train", *common, f"run.dir={folder.parent}", f"run.name={folder.name}", *words])


def start(
    folder: Path, *words: str, common: Sequence[str] = SMALL, address: str | None = None
) -> subprocess.Popen[str]:
    """`expertail train` in a process of its own, on a Ray's address or the session's; its workers are its own."""
    import ray

    command = [sys.executable, "-m", "orchestration", "train", *common]
    environment = os.environ | {"RAY_ADDRESS": address or ray.get_runtime_context().gcs_address}
    return subprocess.Popen(
        [*command, f"run.dir={folder.parent}", f"run.name={folder.name}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for_step(folder: Path, step: int, limit_s: float = 120.0, stage: str | None = None) -> None:
    """Until the journal of a run shows a step, of a stage if one is named."""
    wait_until(lambda: max(steps(folder, stage), default=0) >= step, f"{folder}: step {step}", limit_s)


def wait_until(reached: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not reached():
        if time.monotonic() >= end:
            raise TimeoutError(f"{what} was not reached in {limit_s} s")
        time.sleep(0.05)


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; a step that is noted twice is an error."""
    found: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["name"] == "train/loss":
            assert record["step"] not in found, f"step {record['step']} is there twice"
            found[record["step"]] = record["value"]
    return found


def points(folder: Path) -> list[tuple[str, int, float]]:
    """Every number of the journal but the speed, in order."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["name"], r["step"], r["value"]) for r in records if r["name"] != "train/images_per_s"]


def steps(folder: Path, stage: str | None = None) -> list[int]:
    return [r["step"] for r in records(folder) if stage in (None, r["stage"])]


def records(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of the journal, which may be growing."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def points_by_stage(folder: Path) -> list[tuple[str, int, str, float]]:
    """Every number of the journal but speeds, whatever the order in which stages side by side noted them."""
    return sorted(
        (r["stage"], r["step"], r["name"], r["value"]) for r in records(folder) if "images_per_s" not in r["name"]
    )


def checkpoints(folder: Path, stages: Sequence[str]) -> dict[str, bytes]:
    """Every byte of the newest checkpoint and of the best weights of each stage."""
    found = {}
    for i, stage in enumerate(stages):
        name = f"{i:02d}-{stage}-"
        newest = sorted((folder / "checkpoints").glob(f"{name}[0-9]*"))[-1]
        best = folder / "checkpoints" / json.loads((newest / "state.json").read_text())["best"]["checkpoint"]
        found |= {f"{f.name}/{p.name}": p.read_bytes() for f in (newest, best) for p in f.iterdir()}
    assert not list((folder / "checkpoints").glob(".writing*"))
    return found


def evaluations(folder: Path) -> dict[str, str]:
    """All files below evaluation/."""
    return {str(p.relative_to(folder)): p.read_text() for p in (folder / "evaluation").rglob("*.json")}


def weights(folder: Path) -> dict[str, bytes]:
    """Bytes of every tensor file of the newest checkpoint and of its stage's best weights."""
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    best = folder / "checkpoints" / json.loads((newest / "state.json").read_text())["best"]["checkpoint"]
    assert not list((folder / "checkpoints").glob(".writing*"))
    return {f"{f.name}/{p.name}": p.read_bytes() for f in (newest, best) for p in sorted(f.glob("*.safetensors"))}
