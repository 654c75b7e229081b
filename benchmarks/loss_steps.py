"""Measure what the step of every loss, mixing and auxiliary costs, against cross-entropy with the same network.

    python -m benchmarks.loss_steps [--rounds 60] [--only ROW ...] [--beside "what else ran"] [--out FILE]
    python -m benchmarks.loss_steps --docs      put the table of what was measured into docs/speed.md

Each side is the product's own `StageTrainer`, in one process without Ray, on one thread: a ResNet-8 on made-up images
of the form of CIFAR-100-LT, batch 128. A small network is the hard case, as a loss costs the same whatever network it
judges. In each round a row and its baseline take one step each, in an order that changes. Printed and saved
(benchmarks/results/loss_steps.json): the median over rounds of the ratio of both and its quartiles, in time and in
processor's time, which other processes disturb less.

Of methods that see a second view through a copy of the network, the same rounds measure what that must cost: drawing
views beyond the baseline's, and a forward pass of the copy. Memory is counted, not sampled: what a checkpoint holds,
and the tensors that a step keeps for its backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import write_images
from benchmarks.tables import ROOT, between_marks
from experts.data.dataset import open_dataset
from experts.ensemble import build_ensemble
from orchestration.config.compose import load_config
from orchestration.config.run_config import RunConfig
from orchestration.config.words import available
from orchestration.storage.exports import TrainingData, export_model
from orchestration.storage.run_folder import RunFolder, origin
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

RESULTS = Path(__file__).parent / "results" / "loss_steps.json"
DOCS = ROOT / "docs" / "speed.md"
COMMON = ("dataset=cifar100_lt", "dataset.max_per_class=30", "dataset.imbalance_ratio=10", "pace=fashion_mnist_lt",
          "protocol=small", "engine.name=torch", "engine.threads=1")  # fmt: skip
WARM_UP = 4  # steps before those that are timed
_TRAIN = "method.stages.train"
_CE = f"{_TRAIN}.objective.name=cross_entropy"
_COSINE = ("method=ce", "method.head={name: cosine, scale: 30}")
_GCL = (*_COSINE, "mix=mixup", f"{_TRAIN}.objective={{name: gcl, scale: 30, strength: 0.5, margin: 0.0, gamma: 0.0}}")
_FORMS = {
    f"{loss}_{form}": (f"method={loss}", f"{_TRAIN}.objective.form={form}")
    for loss, form in (("class_balanced", "sigmoid"), ("class_balanced", "focal"), ("focal", "sigmoid"))
}


class Row(NamedTuple):
    """Two sides to compare: words and stage of a loss, and of cross-entropy.

    Attributes:
        words: of the loss, without those that all rows share.
        baseline: of cross-entropy with the same network.
        stage: the stage that is measured, of both.
        more: what the method does more than another loss, where it does.
        must: whether memory, and the least that its views and its copy of the network cost, are measured too.
    """

    words: tuple[str, ...]
    baseline: tuple[str, ...] = ("method=ce",)
    stage: str = "train"
    more: str = ""
    must: bool = False


def _loss(name: str) -> Row:
    return Row(_FORMS.get(name, (f"method={name}",)))


def _then(stage: str, *host: str) -> Row:
    words = (*(host or ("method=ce",)), f"then={stage}")
    return Row(words, (*words, f"method.stages.{stage}.objective.name=cross_entropy"), stage)


_ON = f"{_TRAIN}.class_weights.after_epoch=0"
ALWAYS = {
    "cutmix": (f"{_TRAIN}.mixing.probability=1",),
    "cmo": (f"{_TRAIN}.mixing.probability=1", f"{_TRAIN}.mixing.quiet_first=0"),
}
"""Every step that is timed is mixed: it costs what a mixed step costs."""
ROWS: dict[str, Row] = {
    **{name: _loss(name) for name in (
        "weighted_softmax", "class_balanced", "class_balanced_sigmoid", "class_balanced_focal", "focal",
        "focal_sigmoid", "esql", "seesaw", "distribution_balanced", "balanced_softmax", "lade",
    )},
    "ce_drw": Row(("method=ce", f"{_TRAIN}.class_weights.rule=effective_number", _ON)),
    "ldam_drw": Row(("method=ldam_drw", _ON), _COSINE),
    "robal": Row(("method=robal",), ("method=robal", _CE)),
    "ride": Row(("method=ride", f"{_TRAIN}.objective.reweight_epoch=0"), ("method=ride", _CE)),
    "dive": Row(("method=dive",), more="a teacher's scores of every image"),
    "gcl_first_stage": Row(_GCL, (*_GCL, _CE)),
    "gcl": _then("gcl", *_GCL),
    "acsl": _then("acsl"),
    "las": _then("las"),
    "mislas": _then("mislas"),
    "gist_classifier": Row(("method=ce", "then=gist_classifier"), ("method=ce", "then=crt"), "",
                           more="the best of five directions for each class"),
    **{mix: Row(("method=ce", f"mix={mix}", *ALWAYS.get(mix, ())), more="blended images, two losses")
       for mix in ("mixup", "remix", "cutmix", "cmo") if mix in available("mix")},
    "ce_randaugment": Row(("method=ce", "dataset.augment.name=randaugment"), more="two more operations on each image"),
    "paco": Row(("method=paco",), more="a second view, a copy of the network, a queue", must=True),
    "kcl": Row(("method=kcl",), more="stronger views, a copy of the network, a queue", must=True),
    "dro_lt": Row(("method=dro_lt",), ("method=dro_lt", "method.stages.robust.auxiliaries={}"), "robust",
                  more="centres of all classes before each epoch", must=True),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="measure nothing, put the table into docs/speed.md")
    options = parser.parse_args()
    if options.docs:
        DOCS.write_text(documented(DOCS.read_text(), json.loads(options.out.read_text())["rows"]))
        return
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.loss_steps --rounds {options.rounds}", **machine(), "threads": 1,
        "load": [round(value, 2) for value in os.getloadavg()], "beside": options.beside, "rows": {},
    }  # fmt: skip
    now = record
    if set(options.only) < set(ROWS) and options.out.exists():  # the other rows stay, with what they were measured by
        record = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), per_class=30, test=200)
        for name in options.only:
            row = measured(ROWS[name], Path(folder), options.rounds)
            record["rows"][name] = row | {"commit": now["commit"], "load": now["load"], "beside": now["beside"]}
            print(line(name, record["rows"][name]), flush=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Return commit, versions and hardware, as a run's folder has them."""
    with tempfile.TemporaryDirectory() as folder:
        RunFolder(Path(folder) / "run").record_start(load_config([]), [], {})
        return origin(json.loads((Path(folder) / "run" / "run.json").read_text()))


def measured(row: Row, folder: Path, rounds: int) -> dict[str, Any]:
    """Return milliseconds per step of a row and of its baseline, and the ratios of both in the same round."""
    sides = {"row": trainer(row.words, row.stage or "gist_classifier", folder),
             "baseline": trainer(row.baseline, row.stage or "crt", folder)}  # fmt: skip
    for side in sides.values():
        for _ in range(WARM_UP):
            step(side)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    least = [needed(side) for side in sides.values()] if row.must else []
    floors = []
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            took[name].append(step(sides[name]))
        if least:
            own, base = map(next, least)
            floors.append(1 + (own - base) / took["baseline"][-1][1])
    found: dict[str, Any] = {"words": row.words, "baseline": row.baseline, "more": row.more}
    if row.must:
        found["must"] = round(statistics.median(floors), 4)
        found["memory"] = {name: memory(side) for name, side in sides.items()}
    for at, kind in enumerate(("time", "cpu")):
        ms = {name: 1000 * statistics.median(pair[at] for pair in pairs) for name, pairs in took.items()}
        ratios = [own[at] / base[at] for own, base in zip(took["row"], took["baseline"], strict=True)]
        found[kind] = {
            **{f"{name}_ms": round(value, 2) for name, value in ms.items()},
            **{
                name: round(of, 4)
                for name, of in zip(("low", "ratio", "high"), statistics.quantiles(ratios), strict=True)
            },
        }
    for side in sides.values():
        side.close()
    return found


def trainer(words: tuple[str, ...], stage: str, folder: Path) -> StageTrainer:
    """Return a trainer of a stage, from new weights, with untrained teachers."""
    config = load_config([*words, *COMMON, f"dataset.root={folder}", f"method.stages.{stage}.batch_size=128",
                          f"method.stages.{stage}.epochs=40"])  # fmt: skip
    dataset = open_dataset(config.dataset)
    teachers = {name: export(config, name, folder) for name in config.method.stages[stage].teachers}
    return StageTrainer(config, stage, dataset, Mesh(mesh_shape(config.method.num_experts, 1)), teachers)


def export(config: RunConfig, stage: str, folder: Path) -> str:
    """Write the network of a stage as it begins, for another stage to learn from; return its folder."""
    dataset = open_dataset(config.dataset)
    ensemble = config.ensemble(stage, dataset.num_classes)
    data = TrainingData(dataset=config.dataset, class_names=dataset.class_names, counts=dataset.counts_C.tolist(),
                        image_shape=(32, 32, 3))  # fmt: skip
    place = folder / f"{stage}.export"
    export_model(
        place, build_ensemble(ensemble, seed=1).state_dict(), ensemble, config.method.aggregator_in(stage), data
    )
    return str(place)


def step(side: StageTrainer) -> tuple[float, float]:
    """Take a step; return its seconds and the processor's."""
    time_s, cpu_s = time.perf_counter(), time.process_time()
    side.train(side.done + 1)
    return time.perf_counter() - time_s, time.process_time() - cpu_s


def needed(side: StageTrainer) -> Iterator[float]:
    """Yield the processor's seconds of drawing a batch with its views, and of a forward pass of the network's copy."""
    setup = side.training
    assert setup is not None
    epoch = 0
    while True:
        stream = iter(setup.batches.iterate(epoch, 0))
        while True:
            start = time.process_time()
            if (batch := next(stream, None)) is None:
                break
            if setup.model.trunk_copy is not None:
                with torch.no_grad():
                    maps = setup.model.trunk_copy(batch.views[0])
                    for expert in setup.model.members():
                        assert expert.momentum_copy is not None
                        expert.momentum_copy["features"](maps)
            yield time.process_time() - start
        epoch += 1


def memory(side: StageTrainer) -> dict[str, float]:
    """Return MiB of a checkpoint, and of what a step keeps for its backward pass beside the weights."""
    with tempfile.TemporaryDirectory() as folder:
        saved = sum(Path(folder, entry.name).stat().st_size for entry in side.save(folder))
    weights = {tensor.untyped_storage().data_ptr() for tensor in side.setup.model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(side)
    return {"checkpoint_mib": round(saved / 2**20, 2), "kept_mib": round(sum(kept.values()) / 2**20, 1)}


def documented(text: str, rows: Mapping[str, dict[str, Any]]) -> str:
    """Return docs/speed.md with its two tables of steps: of losses, and of what has views, copies or centres."""
    plain = {name: found for name, found in rows.items() if "must" not in found}
    tables = {"steps": list(table(plain)), "views": list(table_of_views(rows, set(rows) - set(plain)))}
    return between_marks(text, tables, DOCS.name, "losses")


def table(rows: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table of losses."""
    yield "| loss | ms per step | time | processor's time | what the method does more |"
    yield "|---" * 5 + "|"
    yield from (line(name, found) for name, found in rows.items())


def table_of_views(rows: Mapping[str, dict[str, Any]], names: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table of methods whose least cost and memory are known."""
    columns = ("method", "processor's time", "must", "MiB kept for backward", "MiB of a checkpoint",
               "what the method does more")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name in (name for name in rows if name in names):
        found, memory = rows[name], rows[name]["memory"]
        parts = [f"{memory['row'][key]:.1f} / {memory['baseline'][key]:.1f}" for key in ("kept_mib", "checkpoint_mib")]
        yield f"| `{name}` | {spread(found['cpu'])} | {found['must']:.2f} | {' | '.join(parts)} | {found['more']} |"


def line(name: str, found: dict[str, Any]) -> str:
    """Return a row of the table."""
    ratios = " | ".join(spread(found[kind]) for kind in ("time", "cpu"))
    return f"| `{name}` | {found['time']['row_ms']:.0f} | {ratios} | {found['more']} |"


def spread(found: Mapping[str, float]) -> str:
    """Return the median of the ratios and their quartiles."""
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


if __name__ == "__main__":
    main()
