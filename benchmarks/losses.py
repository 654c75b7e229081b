"""Every loss, second stage and mixing, and ways to better features, on the same images with one schedule and seeds.

    python -m benchmarks.losses run   [--cifar <folder>] [--fashion <folder>] [--seeds 0,1,2] [--only mixing ride ...]
    python -m benchmarks.losses table [--docs]
    python -m benchmarks.losses pair  --only ce ssp_rotation
    python -m benchmarks.losses list

A ResNet-8 for 40 epochs, or 15 on Fashion-MNIST, second stages for 10, all by pace=fashion_mnist_lt; the last epoch
counts. `run` trains what is not finished, two runs at a time with one thread each, CIFAR-10-LT first and seeds
outermost, so that a part of the table is a table. It can be stopped and started again; a file PAUSE in the folder of
the runs makes it wait before the next run; several commands may work on one folder, also from different checkouts
(seeds.py). `table` reads the finished runs, writes benchmarks/results/losses.json, or --out, and prints the tables;
with --docs it also puts them into docs/results.md. `pair` compares two networks on CIFAR-10-LT seed by seed, over all
seeds that both have. `list` prints the words of each run.

Second stages of the same network are final stages of one run, so they share its training.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks import seeds
from benchmarks.seeds import CIFAR, FASHION, GROUPS, Job, mean_and_spread, percent

RESULTS = Path(__file__).parent / "results" / "losses.json"
DOCS = Path(__file__).parents[1] / "docs" / "results.md"
PUBLISHED = Path(__file__).parents[1] / "configs" / "published.yaml"
SCHEDULE = ("pace=fashion_mnist_lt", "run.evaluate_every_epochs=1000")
IMAGES = {"cifar": CIFAR, "fashion": FASHION}

_STAGE = "method.stages.train"
_GCL = "{name: gcl, scale: 30, strength: 0.5, margin: 0.0, gamma: 0.0}"
LOSSES: dict[str, tuple[str, ...]] = {
    "ce": ("method=ce", "then=[joint,las,gist_classifier,acsl]"),
    "balanced_softmax": ("method=balanced_softmax",),
    "ldam_drw": ("method=ldam_drw",),
    # method=gcl from its parts, so that its first stage has a row too
    "gcl": ("method=ce", "mix=mixup", "method.head={name: cosine, scale: 30}", f"{_STAGE}.objective={_GCL}",
            "then=[joint,gcl]"),
    "weighted_softmax": ("method=weighted_softmax",),
    "class_balanced": ("method=class_balanced",),
    "class_balanced_sigmoid": ("method=class_balanced", f"{_STAGE}.objective.form=sigmoid"),
    "class_balanced_focal": ("method=class_balanced", f"{_STAGE}.objective.form=focal"),
    "focal": ("method=focal",),
    "focal_sigmoid": ("method=focal", f"{_STAGE}.objective.form=sigmoid"),
    "ce_drw": ("method=ce", f"{_STAGE}.class_weights.rule=effective_number", f"{_STAGE}.class_weights.after_epoch=80%"),
    "lade": ("method=lade",),
    "seesaw": ("method=seesaw",),
    "esql": ("method=esql",),
    "distribution_balanced": ("method=distribution_balanced",),
    "robal": ("method=robal",),
    "mixup": ("method=ce", "mix=mixup", "then=[joint,mislas]"),
    "ce_randaugment": ("method=ce", "dataset.augment.name=randaugment"),
    "ride": ("method=ride",),
    "dive": ("method=dive",),
}  # fmt: skip
"""The words of every network that is trained, by the name of its run."""
MIXING: dict[str, tuple[str, ...]] = {
    f"{host}_{mix}": (f"method={host}", f"mix={mix}")
    for mix in ("cmo", "cutmix", "remix")
    for host in ("ce", "balanced_softmax", "ldam_drw", "ride")
}
REPRESENTATION: dict[str, tuple[str, ...]] = {
    "paco": ("method=paco",),
    "kcl": ("method=kcl",),
    "ssp_rotation": ("method=ssp_rotation",),
    "ssp_longer": ("method=ssp_rotation", "method.stages.pretrain.epochs=120"),
    "deconfound": ("method=deconfound",),
    "oltr": ("method=oltr",),
}
NETWORKS: dict[str, dict[str, tuple[str, ...]]] = {
    "losses": LOSSES, "mixing": MIXING, "representation": REPRESENTATION,
}  # fmt: skip
EPOCHS = {"cifar": 40, "fashion": 15}
_WORDS = {name: words for networks in NETWORKS.values() for name, words in networks.items()}
_FIRST_STAGES = {"dive": ("teacher",), "ssp_rotation": ("pretrain",)}  # beside `train`, as long as it
CIFAR_WORDS: dict[str, tuple[str, ...]] = {
    "deconfound": ("method.head.momentum=0.9", "method.head.alpha=1"),
    "mixup": ("method.stages.mislas.lr_factors.heads=0.5", "method.stages.mislas.frozen_batchnorm=eval"),
    **{name: ("method.stages.train.mixing.probability=0.5",) for name in MIXING if name.endswith("_cutmix")},
}
"""Words published for CIFAR-10 that would else not apply, because here it is a folder of images."""


OTHERWISE = {
    # the paper as the field quotes it: its best form, beta and gamma, whichever they were
    "class_balanced": {"cifar10_lt": {"all": 74.57}, "cifar100_lt": {"all": 39.6}},
    "ce": {"cifar10_lt": {"all": 71.36}},  # README of the logit adjustment code, 1241 epochs of another subset
    "focal": {"cifar100_lt": {"all": 38.41}},  # Cao et al. 2019 as the field quotes it: gamma 1, with a gradient
    "ce+mixup": {"cifar10_lt": {"all": 72.8}, "cifar100_lt": {"all": 39.5}},  # README of MiSLAS, its first stage
    "kcl": {"cifar10_lt": {"all": 77.6}, "cifar100_lt": {"all": 42.8}},  # as quoted elsewhere, its schedule not known
    "deconfound": {"cifar100_lt": {"all": 44.1}},  # its paper: a ResNet-32 of twice the features
}
"""Published top-1 under conditions that the recipe does not meet, so configs/published.yaml does not have it."""


class Row(NamedTuple):
    """A row of the table: which stage of which network it shows.

    Attributes:
        label: how the table names it.
        network: the name of the network's run.
        final: its stage, of a network with several; None for the only one.
        published: the recipe in configs/published.yaml, or above, whose numbers stand beside.
    """

    label: str
    network: str
    final: str | None = None
    published: str | None = None


ROWS = (
    Row("`ce`: cross-entropy", "ce", "joint", "ce"),
    Row("`weighted_softmax`", "weighted_softmax"),
    Row("`class_balanced`", "class_balanced", None, "class_balanced"),
    Row("`class_balanced`, form sigmoid", "class_balanced_sigmoid"),
    Row("`class_balanced`, form focal", "class_balanced_focal"),
    Row("`focal`", "focal", None, "focal"),
    Row("`focal`, form sigmoid", "focal_sigmoid"),
    Row("`esql`", "esql"),
    Row("`seesaw`", "seesaw"),
    Row("`distribution_balanced`", "distribution_balanced"),
    Row("`acsl`: `ce`, then ACSL", "ce", "acsl"),
    Row("`ce` with DRW", "ce_drw"),
    Row("`ldam_drw`", "ldam_drw", None, "ldam_drw"),
    Row("`robal`, clean", "robal"),
    Row("`balanced_softmax`", "balanced_softmax", None, "logit_adjustment"),
    Row("`lade`", "lade", None, "lade"),
    Row("`gcl`, first stage", "gcl", "joint"),
    Row("`gcl`", "gcl", "gcl", "gcl"),
    Row("`ce` + `las`", "ce", "las"),
    Row("`ce` + `gist_classifier`", "ce", "gist_classifier"),
    Row("`ce` + `mixup`", "mixup", "joint", "ce+mixup"),
    Row("`ce` + RandAugment", "ce_randaugment"),
    Row("`mislas`: mixup, then its stage", "mixup", "mislas", "mislas"),
    Row("`dive`", "dive", None, "dive"),
    Row("`ride`", "ride", None, "ride"),
    *(Row(f"`{host}` + `{mix}`", f"{host}_{mix}", None, f"{host}+{mix}")
      for host in ("ce", "balanced_softmax", "ldam_drw", "ride") for mix in ("remix", "cutmix", "cmo")),
)  # fmt: skip
BASELINE = ROWS[0]
TABLES: dict[str, tuple[str, tuple[Row, ...]]] = {
    "cifar": ("cifar", ROWS),
    "fashion": ("fashion", ROWS),
    "representation": ("cifar", (
        BASELINE,
        Row("`balanced_softmax`", "balanced_softmax", None, "logit_adjustment"),
        Row("`deconfound`", "deconfound", None, "deconfound"),
        Row("`oltr`", "oltr", None, "oltr"),
        Row("`ssp_rotation`, then cross-entropy", "ssp_rotation", None, "ssp_rotation"),
        Row("`ssp_rotation` after 120 epochs", "ssp_longer"),
        Row("`kcl`, its second stage cRT", "kcl", None, "kcl"),
        Row("`paco`", "paco", None, "paco"),
    )),
}  # fmt: skip
"""Data set and rows by the name of a table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "pair", "list"))
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as a tree train/<class>/*, test/<class>/*")
    parser.add_argument("--fashion", type=Path, help="folder of the four .gz files")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", nargs="+", choices=(*NETWORKS, *_WORDS), help="kinds of networks, or networks")
    parser.add_argument("--epochs", type=int, help="of first stages, else 40 and 15; all runs of a table need the same")
    parser.add_argument("--runs", type=Path, default=Path("runs/losses"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that `table` writes the numbers to")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/results.md")
    options = parser.parse_args()
    networks = {name: words for kind, found in NETWORKS.items() for name, words in found.items()
                if options.only is None or {kind, name} & set(options.only)}  # fmt: skip
    if options.command == "list":
        print("\n".join(f"{name}: {' '.join(words)}" for name, words in networks.items()))
    elif options.command == "pair":
        record = paired(options.runs, *options.only)
        Path(RESULTS.parent, f"losses_{'_'.join(options.only)}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["gain"], indent=1))
    elif options.command == "run":
        folders = {data: folder for data, folder in (("cifar", options.cifar), ("fashion", options.fashion)) if folder}
        numbers = [int(seed) for seed in options.seeds.split(",")]
        jobs = [
            Job(f"{data}-{name}-s{seed}", (*words_of(data, name, options.epochs or EPOCHS[data]),
                                           f"dataset.root={folder.absolute()}", f"seed={seed}"))
            for data, folder in folders.items() for seed in numbers for name in networks
            if data == "cifar" or name not in REPRESENTATION
        ]  # fmt: skip
        seeds.train_all(options.runs.absolute(), jobs)
    else:
        record = summary(options.runs)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        tables = {data: "\n".join(table(rows)) for data, rows in record["results"].items()}
        print("\n\n".join(tables.values()))
        if options.docs:
            DOCS.write_text(filled_in(DOCS.read_text(), tables))


def words_of(data: str, network: str, epochs: int) -> tuple[str, ...]:
    """Return the words of a network's run, without the folder of its images and its seed."""
    words = _WORDS[network]
    if data == "cifar":
        words += CIFAR_WORDS.get(network, ())
    stages = ("train", *_FIRST_STAGES.get(network, ()))
    shorter = () if epochs == 40 else tuple(f"method.stages.{stage}.epochs={epochs}" for stage in stages)
    images = IMAGES[data]
    if any(word.startswith("dataset.augment.name=") for word in words):  # in the place of the images' own
        images = tuple(word for word in images if not word.startswith("dataset.augment."))
    return (*words, *SCHEDULE, *shorter, *images)


def summary(runs: Path) -> dict[str, Any]:
    """Return for every data set and row what its finished runs found, with commits, versions and hardware."""
    results: dict[str, dict[str, Any]] = {}
    makers: dict[str, Any] = {}
    for title, (data, rows) in TABLES.items():
        for row in rows:
            folders = {
                int(folder.name.rpartition("-s")[2]): folder for folder in runs.glob(f"{data}-{row.network}-s*/")
            }
            done = {seed: folders[seed] for seed in sorted(folders) if seeds.is_finished(folders[seed])}
            if done:
                results.setdefault(title, {})[row.label] = entry_of(data, row, done)
                makers = makers or seeds.made_by(next(iter(done.values())))
    for entries in results.values():
        for label, entry in entries.items():
            known = BASELINE.label in entries and label != BASELINE.label
            entry["gain"] = gains(entry, entries[BASELINE.label]) if known else None
    return {"command": "python -m benchmarks.losses run --cifar <folder> --fashion <folder>", **makers,
            "results": results}  # fmt: skip


def entry_of(data: str, row: Row, done: Mapping[int, Path]) -> dict[str, Any]:
    """Return a row's accuracies by seed, their mean and spread, what its training costs, and published numbers."""
    top1 = seeds.accuracies(seeds.evaluation(folder, row.final) for folder in done.values())
    both = {group: mean_and_spread(values) for group, values in top1.items()}
    runs = [json.loads((folder / "run.json").read_text()) for folder in done.values()]
    epochs = epochs_of(next(iter(done.values())))
    if others := [folder.name for folder in done.values() if epochs_of(folder) != epochs]:
        raise ValueError(
            f"{', '.join(others)}: other epochs than {epochs}; one table needs the same; use another --runs"
        )
    return {
        "words": list(_WORDS[row.network]),
        "final": row.final,
        "seeds": list(done),
        "commits": sorted({run["commit"] for run in runs}),
        "epochs": epochs,
        "top1": top1,
        "mean": {group: mean for group, (mean, _) in both.items()},
        "spread": {group: spread for group, (_, spread) in both.items()},
        "training_multiply_adds": work_of(data, row, epochs["train"]),
        "published": published_of(row),
    }


def paired(runs: Path, first: str, second: str) -> dict[str, Any]:
    """Return by how much the second of two networks beats the first on the same seeds: mean and standard error."""
    seeds_of = [{int(f.name.rpartition("-s")[2]) for f in runs.glob(f"cifar-{name}-s*/") if seeds.is_finished(f)}
                for name in (first, second)]  # fmt: skip
    both = sorted(set.intersection(*seeds_of))
    folders = {name: [runs / f"cifar-{name}-s{seed}" for seed in both] for name in (first, second)}
    finals = {row.network: row.final for row in reversed(TABLES["cifar"][1] + TABLES["representation"][1])}
    top1 = {name: seeds.accuracies(seeds.evaluation(f, finals[name]) for f in own) for name, own in folders.items()}
    gain = {}
    for group in GROUPS:
        pairs = zip(top1[first][group], top1[second][group], strict=True)
        mean, spread = mean_and_spread(own - base for base, own in pairs if own is not None and base is not None)
        gain[group] = {"mean": mean, "standard_error": spread and spread / math.sqrt(len(both))}
    commits = {name: [json.loads((f / "run.json").read_text())["commit"] for f in own] for name, own in folders.items()}
    command = f"python -m benchmarks.losses pair --only {first} {second}"
    found = {"seeds": both, "commits": commits, "top1": top1, "gain": gain}
    return {"command": command, **seeds.made_by(folders[first][-1]), **found}


def published_of(row: Row) -> dict[str, dict[str, float]]:
    """Return the published top-1 for CIFAR-10-LT and CIFAR-100-LT, in percent by group."""
    found = yaml.safe_load(PUBLISHED.read_text())["results"].get(row.published, {})
    numbers = OTHERWISE.get(row.published or "", {}) | {name: entry["top1"] for name, entry in found.items()}
    return {name: top1 for name, top1 in numbers.items() if name in ("cifar10_lt", "cifar100_lt")}


def gains(entry: dict[str, Any], baseline: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return by how much a row beats the baseline: in shares, and in standard deviations over seeds.

    The deviation is the root of the mean of both variances.
    """
    found: dict[str, dict[str, float | None]] = {}
    for group in GROUPS:
        means, spreads = ([part[kind][group] for part in (entry, baseline)] for kind in ("mean", "spread"))
        gain = None if None in means else means[0] - means[1]
        spread = None if None in spreads else math.sqrt(sum(value**2 for value in spreads) / 2)
        found[group] = {"gain": gain, "deviations": gain / spread if gain is not None and spread else None}
    return found


def epochs_of(folder: Path) -> dict[str, int]:
    """Return the epochs of every stage of a run."""
    stages = yaml.safe_load((folder / "config.yaml").read_text())["method"]["stages"]
    return {name: stage["epochs"] for name, stage in stages.items()}


def work_of(data: str, row: Row, epochs: int) -> float | None:
    """Return the multiply-adds of training the stages that a row needs, as `expertail plan` counts them."""
    from orchestration.config.compose import load_config
    from orchestration.preflight.plan import plan

    classes = ["dataset.num_classes=10"] if data == "cifar" else []  # a folder that is not there is not counted
    config = load_config([*words_of(data, row.network, epochs), *classes])
    others = set(config.method.finals) - {row.final} if row.final else set()
    return seeds.training_work(stage for stage in plan(config).stages if stage.name not in others)


def table(rows: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table: rows without finished runs are left out."""
    columns = ("loss", "all", "many > 100", "medium", "few < 20", "by index", "medium and few beyond `ce`",
               "10^12 multiply-adds", "published")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for label, entry in rows.items():
        fewer = "" if len(entry["seeds"]) >= 3 else f" ({len(entry['seeds'])} of 3 seeds)"
        cells = [percent(entry["mean"][group], entry["spread"][group]) for group in GROUPS[:4]]
        index = " / ".join(percent(entry["mean"][group]) for group in GROUPS[4:])
        work = entry["training_multiply_adds"]
        cost = "n/a" if work is None else f"{work / 1e12:.2f}"
        yield f"| {label}{fewer} | {' | '.join(cells)} | {index} | {beyond(entry)} | {cost} | {beside(entry)} |"


def beyond(entry: dict[str, Any]) -> str:
    """Say by how many points a row beats the baseline, and whether that is more than two standard deviations."""
    if entry["gain"] is None:
        return ""
    parts = []
    for group in ("medium", "few"):
        found = entry["gain"][group]
        points = "n/a" if found["gain"] is None else f"{100 * found['gain']:+.1f}"
        sure = found["deviations"] is not None and abs(found["deviations"]) > 2
        parts.append(f"**{points}**" if sure else points)
    return " / ".join(parts)


def beside(entry: dict[str, Any]) -> str:
    """Return the published numbers for CIFAR-10-LT and CIFAR-100-LT."""
    found = [entry["published"].get(name, {}).get("all") for name in ("cifar10_lt", "cifar100_lt")]
    return "" if found == [None, None] else " / ".join("-" if value is None else f"{value:.1f}" for value in found)


def filled_in(text: str, tables: Mapping[str, str]) -> str:
    """Put tables into a document, between `<!-- losses: NAME -->` and `<!-- end -->`."""
    for data, lines in tables.items():
        start, end = f"<!-- losses: {data} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(
                f"{DOCS}: found no lines '{start.strip()}' and '{end}'; needed both, with the table between"
            )
        text = f"{before}{start}\n{lines}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    main()
