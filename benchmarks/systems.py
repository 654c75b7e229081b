"""Train every recipe on the same real images with one schedule and the same seeds: the table of the README.

    python benchmarks/systems.py run   --fashion <folder> [--cifar <folder>] [--seeds 0,1,2] [--runs <folder>]
    python benchmarks/systems.py table --runs <folder> [--out benchmarks/results/systems.json]

`run` trains every run that is not finished, two in parallel with one thread each; it can be stopped and started again.
`table` reads the run folders and writes mean and sample standard deviation over seeds of the *last* epoch's accuracy,
by both rules for groups, with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

METHODS = (
    "ce", "ldam", "ride", "ride_router", "ride_distill", "ride_h2t", "tade", "ace", "bbn", "reslt", "reslt_h2t", "lfme",
    "dr_h2t",
)  # fmt: skip
CIFAR_METHODS = ("ce", "ride", "tade")
GROUPS = ("all", "many", "medium", "few", "many_by_index", "medium_by_index", "few_by_index")
FASHION = [
    "dataset=fashion_mnist_lt", "dataset.max_per_class=1000", "dataset.imbalance_ratio=100", "dataset.image_size=28",
]  # fmt: skip
CIFAR = [
    "dataset=image_folder_lt", "dataset.imbalance_ratio=100", "dataset.max_per_class=1000",
    "dataset.index_groups=[3,7]", "dataset.mean=[0.4914,0.4822,0.4465]",
    "dataset.std=[0.2023,0.1994,0.2010]", "dataset.augment.crop_padding=4",
    "dataset.augment.horizontal_flip=0.5",
]  # fmt: skip
COMMON = ["engine.threads=1", "cluster.cpus_per_worker=1", "tracking.enabled=false", "run.log_interval_s=30"]

mp = multiprocessing.get_context("spawn")  # each process starts its own Ray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--fashion", help="folder of the four .gz files")
    parser.add_argument("--cifar", help="CIFAR-10 as a tree train/<class>/*, test/<class>/*")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", default="runs/systems")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "systems.json"))
    options = parser.parse_args()
    runs = Path(options.runs).absolute()
    if options.command == "table":
        record = summary(runs)
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
        print(markdown(record))
        return

    # Teachers come first, since the students of `ride_distill` learn from them.
    seeds = [int(seed) for seed in options.seeds.split(",")]
    first, then = [], []
    for seed in seeds:
        if options.fashion:
            teacher = ["method=ride", "method.num_experts=6", *fashion(options.fashion, seed), *schedule("ride")]
            first.append((f"fashion-teacher-s{seed}", teacher))
            then += [
                (f"fashion-{m}-s{seed}", [*fashion(options.fashion, seed), *words(m, runs, seed)]) for m in METHODS
            ]
        if options.cifar:
            where = [*CIFAR, f"dataset.root={Path(options.cifar).absolute()}", f"seed={seed}"]
            then += [(f"cifar-{m}-s{seed}", [f"method={m}", "pace=fashion_mnist_lt", *where]) for m in CIFAR_METHODS]
    for wave in (first, then):
        processes = [mp.Process(target=train, args=(runs, wave[half::2])) for half in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


def fashion(root: str, seed: int) -> list[str]:
    """Return the overrides that all runs on Fashion-MNIST-LT share."""
    return [*FASHION, f"dataset.root={Path(root).absolute()}", f"seed={seed}"]


def words(method: str, runs: Path, seed: int) -> list[str]:
    """Return a recipe's own overrides. Only the last epoch is evaluated, as only it is reported, except for LFME: its
    student is led by validation accuracy."""
    more = {
        "ride_distill": [f"method.stages.train.teachers.teacher.run={runs}/fashion-teacher-s{seed}"],
        "lfme": ["run.evaluate_every_epochs=2"],
    }
    return [f"method={method}", *more.get(method, []), *schedule(method)]


def schedule(method: str) -> list[str]:
    """Return the schedule of all recipes: the Fashion-MNIST presets' at a quarter of its length, 10 epochs (H2T's stage
    and the router's: 3)."""
    from orchestration.config.compose import load_config

    teacher = ["method.stages.train.teachers.teacher.run=runs/teacher"] if method == "ride_distill" else []
    chosen = []
    for name, stage in load_config([f"method={method}", "dataset=fashion_mnist_lt", *teacher]).method.stages.items():
        key = f"method.stages.{name}"
        if name in ("h2t", "router"):
            chosen.append(f"{key}.epochs=3")
            continue
        drops = "[{after_epoch: 8, factor: 0.01}, {after_epoch: 9, factor: 0.0001}]"
        chosen += [f"{key}.epochs=10", f"{key}.lr_schedule.warmup_epochs=1", f"{key}.lr_schedule.milestones={drops}"]
        if getattr(stage.objective, "reweight_epoch", None) is not None:
            chosen.append(f"{key}.objective.reweight_epoch=8")
    return chosen


def train(runs: Path, chosen: list[tuple[str, list[str]]]) -> None:
    """Train runs one after another, in one Ray started by this process."""
    from orchestration.cli import main as expertail
    from orchestration.cluster.local_ray import start_local_ray

    start_local_ray()
    for name, overrides in chosen:
        seldom = (
            [] if any(w.startswith("run.evaluate_every") for w in overrides) else ["run.evaluate_every_epochs=1000"]
        )
        runs.mkdir(parents=True, exist_ok=True)
        with open(runs / f"{name}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
            code = expertail(["train", *overrides, *COMMON, *seldom, f"run.dir={runs}", f"run.name={name}"])
        print(f"{name}: {'done' if code == 0 else f'exit code {code}, see {runs}/{name}.log'}", flush=True)


def finished(runs: Path) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Yield data, method, run.json and last evaluation of every finished run."""
    for path in sorted(runs.glob("*-s[0-9]*/run.json")):
        run = json.loads(path.read_text())
        evaluation = path.parent / "evaluation" / "last.json"
        if run.get("status") == "finished" and evaluation.exists():
            data, _, rest = path.parent.name.partition("-")
            yield data, rest.rsplit("-s", 1)[0], run, json.loads(evaluation.read_text())


def summary(runs: Path) -> dict[str, Any]:
    """Return mean, spread and every seed's value by data set, method and group, with hardware and versions."""
    found: dict[str, dict[str, Any]] = {}
    makers: dict[str, Any] = {}
    for data, method, run, evaluation in finished(runs):
        entry = found.setdefault(data, {}).setdefault(method, {"seeds": [], "cpu_hours": []})
        top1 = entry.setdefault("top1", {group: [] for group in GROUPS})
        entry["seeds"].append(run["seed"])
        entry["cpu_hours"].append(run["cost"]["cpu_hours"])
        for group in GROUPS:
            top1[group].append(evaluation["members"]["ensemble"]["top1"][group])
        if "all experts" in evaluation["members"]:
            entry.setdefault("all_experts", []).append(evaluation["members"]["all experts"]["top1"]["all"])
            entry.setdefault("experts_used", []).append(evaluation["per_image"]["experts_used"]["all"])
        entry["config_hash"] = run["config_hash"]
        makers = {key: run[key] for key in ("commit", "versions", "host")}
    for data, methods in found.items():
        for method, entry in methods.items():
            entry["mean"], entry["spread"] = {}, {}
            for group, values in entry["top1"].items():
                known = [value for value in values if value is not None]
                entry["mean"][group] = statistics.mean(known) if known else None
                entry["spread"][group] = statistics.stdev(known) if len(known) > 1 else None
            entry.update(size(data, method, runs / "fashion-teacher-s0"))
    return {
        "command": "python benchmarks/systems.py run --fashion <folder> --cifar <folder>",
        **makers,
        "results": found,
    }


def size(data: str, method: str, teacher: Path) -> dict[str, Any]:
    """Return parameters and multiply-adds per image of the final ensemble, and multiply-adds of training, as
    `expertail plan` counts them; a student's do not include its teacher's training."""
    from orchestration.config.compose import load_config
    from orchestration.preflight.plan import plan

    if method == "teacher":
        chosen = ["method=ride", "method.num_experts=6", *FASHION, *schedule("ride")]
    elif data == "fashion":
        chosen = [f"method={method}", *FASHION, *schedule(method)]
    else:
        chosen = [f"method={method}", "pace=fashion_mnist_lt", *CIFAR, "dataset.num_classes=10"]
    if method == "ride_distill":
        chosen.append(f"method.stages.train.teachers.teacher.run={teacher}")
    found = plan(load_config(chosen))
    final = found.final.size
    work = [(stage.work, stage.images_per_epoch, stage.epochs) for stage in found.stages]
    known = all(None not in entry for entry in work)
    return {
        "parameters": final.parameters,
        "multiply_adds": final.work,
        "training_multiply_adds": sum(math.prod(entry) for entry in work) if known else None,  # type: ignore[arg-type]
    }


def markdown(record: dict[str, Any]) -> str:
    """Return the table of the README."""
    lines = []
    for data, methods in record["results"].items():
        columns = ("recipe", "all", "many", "medium", "few", "by index", "parameters", "M per image", "T to train")
        lines += ["", data, f"| {' | '.join(columns)} |"]
        lines.append("|---" * 9 + "|")
        order = [m for m in ("ce", "ldam", "teacher", *METHODS) if m in methods]
        for method in dict.fromkeys(order):
            entry = methods[method]
            cells = [with_spread(entry, group) for group in GROUPS[:4]]
            index = " / ".join(with_spread(entry, group, spread=False) for group in GROUPS[4:])
            work = entry["training_multiply_adds"]
            lines.append(
                f"| `{method}` | {' | '.join(cells)} | {index} | {entry['parameters']:,} | "
                f"{entry['multiply_adds'] / 1e6:.1f} | {'n/a' if work is None else f'{work / 1e12:.2f}'} |"
            )
    return "\n".join(lines)


def with_spread(entry: dict[str, Any], group: str, *, spread: bool = True) -> str:
    """Return the mean in percent, with its standard deviation unless that is unknown or not wanted."""
    mean, deviation = entry["mean"][group], entry["spread"][group]
    if mean is None:
        return "n/a"
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if spread and deviation is not None else "")


if __name__ == "__main__":
    main()
