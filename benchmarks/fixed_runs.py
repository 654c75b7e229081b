"""Check that a change of the code leaves every number of a run as it was.

    python benchmarks/fixed_runs.py run OUT [--checkout FOLDER]     train the fixed runs with a checkout's code
    python benchmarks/fixed_runs.py compare BEFORE AFTER            fail if a value, weight or evaluation differs

The runs: every recipe on digits, packed, with short stages; RIDE spread over three workers; RIDE stopped after 13 steps
and resumed. All use one thread, so values can be compared bit by bit. Times and speeds are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from orchestration.config.identity import flatten

_EVERY_RUN = [
    "dataset=digits_lt",
    "dataset.image_size=16",
    "engine.threads=1",
    "run.checkpoint_every_steps=5",
    "run.pictures=false",
    "tracking.enabled=false",
    "seed=7",
]
_BATCH_SIZE, _EPOCHS = 50, 3  # 405 images: 9 steps per epoch
_EPOCHS_OF_LATER_STAGES = 1


def main() -> int:
    """Run one of the two commands. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    compare = commands.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        return train_all(options.checkout, options.out.resolve())
    return compare_all(options.before, options.after)


def train_all(checkout: Path, out: Path) -> int:
    """Train the fixed runs into a folder."""
    methods = sorted(path.stem for path in (checkout / "configs" / "method").glob("*.yaml"))
    teacher = ["method=ride", "method.num_experts=2", *_short("ride", checkout)]
    _train(checkout, out, "teacher", teacher)
    for method in methods:
        words = [f"method={method}", *_short(method, checkout)]
        if method == "ride_distill":
            words.append(f"method.stages.train.teachers.teacher.run={out / 'teacher'}")
        _train(checkout, out, method, words)
    ride = ["method=ride", *_short("ride", checkout)]
    _train(checkout, out, "ride_spread", [*ride, "cluster.workers=3"])
    _train(checkout, out, "ride_resumed", [*ride, "run.max_steps=13"])
    _train(checkout, out, "ride_resumed", ride)
    return 0


_STAGES = """
import json, sys
from orchestration.config.compose import load_config
stages = load_config([f"method={sys.argv[1]}", "dataset=digits_lt"]).method.model_dump(mode="json")["stages"]
print(json.dumps(stages))
"""


def _short(method: str, checkout: Path) -> list[str]:
    """Return overrides that make every stage of a recipe short, and leave its drops and switches where they were.

    A recipe may write them as percentages, which a shorter stage would scale.
    """
    done = subprocess.run(
        [sys.executable, "-c", _STAGES, method], cwd=checkout, capture_output=True, text=True, check=True
    )
    words = []
    for i, (stage, settings) in enumerate(json.loads(done.stdout).items()):
        if settings["epochs"]:
            epochs = _EPOCHS if i == 0 else _EPOCHS_OF_LATER_STAGES
            words += [f"method.stages.{stage}.epochs={epochs}", f"method.stages.{stage}.batch_size={_BATCH_SIZE}"]
            words += [f"method.stages.{stage}.{key}={_word(settings[key])}" for key in ("lr_schedule", "objective")]
    return words


def _word(value: Any) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_word, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _train(checkout: Path, out: Path, name: str, words: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "orchestration",
        "train",
        *_EVERY_RUN,
        *words,
        f"run.dir={out}",
        f"run.name={name}",
    ]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    print(f"{name}: {len(_points(out / name))} values", flush=True)


def compare_all(before: Path, after: Path) -> int:
    """Print a line per run. Returns 1 if anything differs or a run is missing, else 0."""
    names = sorted(path.parent.name for path in before.glob("*/metrics.jsonl"))
    differing = 0
    for name in names:
        unequal = _differences(before / name, after / name)
        differing += bool(unequal)
        print(f"{name}: {', '.join(unequal) + ' differ' if unequal else 'equal'}")
    print(f"{len(names)} runs, {differing} differ")
    return 1 if differing or not names else 0


def _differences(before: Path, after: Path) -> list[str]:
    if not (after / "metrics.jsonl").exists():
        return ["the run is missing: all"]
    kinds = {"values": _points, "weights": _weights, "evaluations": _evaluations}
    found = [kind for kind, of in kinds.items() if of(before) != of(after)]
    old, new = _config(before), _config(after)  # a later version may have more keys, with their defaults
    return found + [key for key in old.keys() & new.keys() if old[key] != new[key]]


def _points(run: Path) -> list[tuple[Any, ...]]:
    """Return every value of a run's journal, sorted: parallel stages write in any order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted(
        (r["stage"], r["step"], r["name"], repr(r["value"])) for r in records if "images_per_s" not in r["name"]
    )


def _weights(run: Path) -> dict[str, str]:
    paths = sorted((run / "checkpoints").rglob("*.safetensors"))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _evaluations(run: Path) -> dict[str, Any]:
    return {str(p.relative_to(run)): json.loads(p.read_text()) for p in sorted((run / "evaluation").rglob("*.json"))}


def _config(run: Path) -> dict[str, Any]:
    """Return the resolved config, flat, without the folder of the runs, which differs by design."""
    text = (run / "config.yaml").read_text()
    return flatten(yaml.safe_load(text.replace(str(run.parent.resolve()), "RUNS")))


if __name__ == "__main__":
    sys.exit(main())
