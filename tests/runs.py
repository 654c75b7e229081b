"""Small runs of the real program, and the results that tests compare."""

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

# 405 digits at 16 x 16 in batches of 50: 9 steps per epoch, the last with 5 images; 27 steps, some seconds.
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
# 180 steps, about ten seconds: long enough for a fault to be noticed.
LONG = [
    *(word for word in SMALL if "epochs" not in word),
    "method.stages.train.epochs=20",
    "run.evaluate_every_epochs=10",
]


class _Driver(subprocess.Popen[str]):
    """A driver's process. Its pipe closes with it, so that a test may kill it and forget it."""

    def __del__(self) -> None:
        if self.stdout is not None:
            self.stdout.close()
        super().__del__()


def train(folder: Path, *words: str, common: Sequence[str] = SMALL) -> int:
    """Run `expertail train` in this process; the run is `folder`."""
    return main(["train", *common, f"run.dir={folder.parent}", f"run.name={folder.name}", *words])


def start(
    folder: Path, *words: str, common: Sequence[str] = SMALL, address: str | None = None
) -> subprocess.Popen[str]:
    """Start `expertail train` as a process, with its own workers, on the Ray at `address` or the session's."""
    import ray

    command = [sys.executable, "-m", "orchestration", "train", *common]
    environment = os.environ | {"RAY_ADDRESS": address or ray.get_runtime_context().gcs_address}
    return _Driver(
        [*command, f"run.dir={folder.parent}", f"run.name={folder.name}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for_step(folder: Path, step: int, limit_s: float = 120.0, stage: str | None = None) -> None:
    """Wait until the journal of a run shows a step, of one stage if it is named."""
    wait_until(lambda: max(steps(folder, stage), default=0) >= step, f"{folder}: step {step}", limit_s)


def wait_until(reached: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not hold within `limit_s`.
    """
    end = time.monotonic() + limit_s
    while not reached():
        if time.monotonic() >= end:
            raise TimeoutError(f"{what} was not reached in {limit_s} s")
        time.sleep(0.05)


def losses(folder: Path) -> dict[int, float]:
    """Return the loss by step. A step that is recorded twice is an error."""
    found: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["name"] == "train/loss":
            assert record["step"] not in found, f"step {record['step']} is there twice"
            found[record["step"]] = record["value"]
    return found


def points(folder: Path) -> list[tuple[str, int, float]]:
    """Return every number of the journal in order, except speeds."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["name"], r["step"], r["value"]) for r in records if r["name"] != "train/images_per_s"]


def steps(folder: Path, stage: str | None = None) -> list[int]:
    """Return the step of every line of the journal, of one stage if it is named."""
    return [r["step"] for r in records(folder) if stage in (None, r["stage"])]


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of the journal, which may be growing."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def points_by_stage(folder: Path) -> list[tuple[str, int, str, float]]:
    """Return every number of the journal except speeds, sorted: parallel stages write in any order."""
    return sorted(
        (r["stage"], r["step"], r["name"], r["value"]) for r in records(folder) if "images_per_s" not in r["name"]
    )


def checkpoints(folder: Path, stages: Sequence[str]) -> dict[str, bytes]:
    """Return every byte of each stage's newest checkpoint and best weights, if it has any."""
    found = {}
    for i, stage in enumerate(stages):
        newest = sorted((folder / "checkpoints").glob(f"{i:02d}-{stage}-[0-9]*"))[-1]
        best = json.loads((newest / "state.json").read_text())["best"]
        folders = [newest, *([folder / "checkpoints" / best["checkpoint"]] if best else [])]
        found |= {f"{f.name}/{p.name}": p.read_bytes() for f in folders for p in f.iterdir()}
    assert not list((folder / "checkpoints").glob(".writing*"))
    return found


def exports(folder: Path) -> dict[str, bytes]:
    """Return every file below export/."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "export").rglob("*") if p.is_file()}


def evaluations(folder: Path) -> dict[str, str]:
    """Return all files below evaluation/."""
    return {str(p.relative_to(folder)): p.read_text() for p in (folder / "evaluation").rglob("*.json")}


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor file of the newest checkpoint and of its stage's best weights."""
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    best = folder / "checkpoints" / json.loads((newest / "state.json").read_text())["best"]["checkpoint"]
    assert not list((folder / "checkpoints").glob(".writing*"))
    return {f"{f.name}/{p.name}": p.read_bytes() for f in (newest, best) for p in sorted(f.glob("*.safetensors"))}
