"""Train every recipe on the same real images with one schedule and the same seeds: the table of the README.

    python -m benchmarks.systems run   --fashion <folder> [--cifar <folder>] [--seeds 0,1,2] [--runs <folder>]
    python -m benchmarks.systems table --runs <folder> [--out benchmarks/results/systems.json]

`run` trains every run that is not finished, two in parallel with one thread each (seeds.py); it can be stopped and
started again.
`table` reads the run folders and writes mean and sample standard deviation over seeds of the *last* epoch's accuracy,
by both rules for groups, with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import seeds
from benchmarks.seeds import CIFAR, GROUPS, Job, mean_and_spread, percent

METHODS = (
    "ce", "ldam", "ride", "ride_router", "ride_distill", "ride_h2t", "tade", "ace", "bbn", "reslt", "reslt_h2t", "lfme",
    "dr_h2t",
)  # fmt: skip
CIFAR_METHODS = ("ce", "ride", "tade")
FASHION = (*seeds.FASHION, "dataset.image_size=28")


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
    first, then = [], []
    for seed in (int(seed) for seed in options.seeds.split(",")):
        if options.fashion:
            where = (*FASHION, f"dataset.root={Path(options.fashion).absolute()}", f"seed={seed}")
            teacher = ("method=ride", "method.num_experts=6", *where, *schedule("ride"))
            first.append(Job(f"fashion-teacher-s{seed}", (*seldom(teacher), *teacher)))
            for method in METHODS:
                chosen = (*where, *words(method, runs, seed))
                then.append(Job(f"fashion-{method}-s{seed}", (*seldom(chosen), *chosen)))
        if options.cifar:
            where = (*CIFAR, f"dataset.root={Path(options.cifar).absolute()}", f"seed={seed}")
            then += [
                Job(f"cifar-{m}-s{seed}", (f"method={m}", "pace=fashion_mnist_lt", *where, *seldom(where)))
                for m in CIFAR_METHODS
            ]
    for wave in (first, then):
        seeds.train_all(runs, wave)


def seldom(chosen: tuple[str, ...]) -> list[str]:
    """Evaluate the last epoch alone, unless the words say otherwise."""
    return [] if any(word.startswith("run.evaluate_every") for word in chosen) else ["run.evaluate_every_epochs=1000"]


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


def finished(runs: Path) -> Iterator[tuple[str, str, dict[str, Any], Path]]:
    """Yield data, method, run.json and folder of every finished run."""
    for path in sorted(runs.glob("*-s[0-9]*/run.json")):
        if seeds.is_finished(path.parent) and (path.parent / "evaluation" / "last.json").exists():
            data, _, rest = path.parent.name.partition("-")
            yield data, rest.rsplit("-s", 1)[0], json.loads(path.read_text()), path.parent


def summary(runs: Path) -> dict[str, Any]:
    """Return mean, spread and every seed's value by data set, method and group, with hardware and versions."""
    found: dict[str, dict[str, Any]] = {}
    makers: dict[str, Any] = {}
    for data, method, run, folder in finished(runs):
        entry = found.setdefault(data, {}).setdefault(method, {"seeds": [], "cpu_hours": []})
        top1 = entry.setdefault("top1", {group: [] for group in GROUPS})
        evaluation = seeds.evaluation(folder)
        entry["seeds"].append(run["seed"])
        entry["cpu_hours"].append(run["cost"]["cpu_hours"])
        for group, values in seeds.accuracies([evaluation]).items():
            top1[group] += values
        if "all experts" in evaluation["members"]:
            entry.setdefault("all_experts", []).append(evaluation["members"]["all experts"]["top1"]["all"])
            entry.setdefault("experts_used", []).append(evaluation["per_image"]["experts_used"]["all"])
        entry["config_hash"] = run["config_hash"]
        makers = seeds.made_by(folder)
    for data, methods in found.items():
        for method, entry in methods.items():
            both = {group: mean_and_spread(values) for group, values in entry["top1"].items()}
            entry["mean"] = {group: mean for group, (mean, _) in both.items()}
            entry["spread"] = {group: spread for group, (_, spread) in both.items()}
            entry.update(size(data, method, runs / "fashion-teacher-s0"))
    return {
        "command": "python -m benchmarks.systems run --fashion <folder> --cifar <folder>",
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
    return {
        "parameters": final.parameters,
        "multiply_adds": final.work,
        "training_multiply_adds": seeds.training_work(found.stages),
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
            cells = [percent(entry["mean"][group], entry["spread"][group]) for group in GROUPS[:4]]
            index = " / ".join(percent(entry["mean"][group]) for group in GROUPS[4:])
            work = entry["training_multiply_adds"]
            lines.append(
                f"| `{method}` | {' | '.join(cells)} | {index} | {entry['parameters']:,} | "
                f"{entry['multiply_adds'] / 1e6:.1f} | {'n/a' if work is None else f'{work / 1e12:.2f}'} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
