"""The evaluate command: measure a saved run again, from its exported model, in this process."""

from __future__ import annotations

import difflib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from aggregation.metrics import Scores
from aggregation.serving import ServedModel, load_model
from experts.data.batches import EvalBatches
from experts.data.dataset import Dataset, open_dataset
from experts.data.stores import Store
from experts.registry import build
from orchestration.compose import check, expand, from_yaml, parse
from orchestration.config import RunConfig
from orchestration.finish import table
from orchestration.run_folder import CONFIG, DATA, RUN, write_atomic
from orchestration.tracking_contents import read_json

MAY_DIFFER = (
    "dataset.root",
    "dataset.train_list",
    "dataset.val_list",
    "dataset.test_list",
    "dataset.download",
    "dataset.loader_processes",
    "dataset.resident",
    "run.evaluation_batch_size",
)
"""Where the data is and how it is read; everything else made the model what it is."""


def reevaluate(run: str, weights: str, split: str, overrides: list[str]) -> str:
    """Score the ensemble and its experts on a split, and keep the result as evaluation/again-<weights>-<split>.json.

    Args:
        run: the run folder.
        weights: "best" or "last".
        split: "test" or "val".
        overrides: `a.b=value` for keys of MAY_DIFFER.

    Returns:
        The table that training prints, for this evaluation alone, and where it was kept.

    Raises:
        ValueError: there is no such run, it has no model yet, a file is damaged, an override would change what is
            measured, or the data is not the run's.
    """
    folder = expand(run)
    config = _override(_stored_config(folder), overrides)
    data = read_json(folder / DATA)
    model = _model(folder, weights)
    store, dataset = _split(folder, config, data, split)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.engine.threads or threads)
    try:
        scores = _score(config, model, store, dataset)
    finally:
        torch.set_num_threads(threads)
    cuts = config.dataset.index_groups
    trained = read_json(folder / "evaluation" / f"{weights}.json")
    evaluation = {
        "split": split,
        "selected_on": trained.get("selected_on"),
        "stage": trained.get("stage"),
        "epoch": trained.get("epoch"),
        "step": trained.get("step"),
        "weights": weights,
        **scores.result(data["counts"], list(cuts) if cuts else None),
    }
    text = table(config, data, {weights: _shown(evaluation)})
    return f"{text}\n\n{_keep(folder, f'again-{weights}-{split}', evaluation)}"


def _stored_config(folder: Path) -> RunConfig:
    if not folder.exists():
        near = difflib.get_close_matches(folder.name, _neighbours(folder.parent), 1)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
        raise ValueError(f"{folder}: nothing there; needed the folder of a run, as runs/<run.name>{hint}")
    if not (folder / CONFIG).is_file():
        found = "a folder without config.yaml" if folder.is_dir() else "a file"
        raise ValueError(f"{folder}: found {found}; needed the folder of a run, which `expertail train` makes")
    return from_yaml(folder / CONFIG)


def _neighbours(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if (path / CONFIG).is_file()] if parent.is_dir() else []


def _override(config: RunConfig, overrides: list[str]) -> RunConfig:
    choices, values = parse(overrides)
    refused = [f"{group}={choice}" for group, choice in choices.items()]
    tree: dict[str, Any] = config.model_dump(mode="json")
    for value in values:
        if value.key_or_group not in MAY_DIFFER:
            refused.append(f"{value.key_or_group}={value.value()}")
            continue
        section, key = value.key_or_group.split(".")
        tree[section][key] = value.value()
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: cannot be changed for a trained run, whose config made the model what it is; what "
            f"may differ is where the data is and how it is read: {', '.join(MAY_DIFFER)}"
        )
    if not any(value.key_or_group == "dataset.resident" for value in values):
        tree["dataset"]["resident"] = "never"  # a split is read once, and the training images not at all
    return check(tree, " ".join(overrides) or "config.yaml")


def _model(folder: Path, weights: str) -> ServedModel:
    export = folder / "export" / weights
    if not export.is_dir():
        status = read_json(folder / RUN)
        command = status.get("command") or "the command that started it"
        raise ValueError(
            f"{export}: there is no model yet, the run is {status.get('status', 'not known to have started')}; "
            f"needed a run that reached its end or run.max_steps; this continues it: {command}"
        )
    return load_model(export)


def _split(folder: Path, config: RunConfig, data: dict[str, Any], split: str) -> tuple[Store, Dataset]:
    if not data.get("digest"):
        raise ValueError(
            f"{folder / DATA}: missing or without a digest; needed to know the run's data; restore the file"
        )
    dataset = open_dataset(config.dataset)
    if dataset.digest != data["digest"]:
        total = data.get("total", "?")
        raise ValueError(
            f"dataset.root = {config.dataset.root}: this is not the data of the run: found digest "
            f"{dataset.digest[:12]} ({int(dataset.counts_C.sum())} training images), needed {data['digest'][:12]} "
            f"({total}); set dataset.root to the folder that the run was trained from"
        )
    store = dataset.test if split == "test" else dataset.val
    if store is None:
        raise ValueError(
            f"--split {split}: the run's dataset {config.dataset.name} has no validation set; use --split test"
        )
    return store, dataset


@torch.no_grad()
def _score(config: RunConfig, model: ServedModel, store: Store, dataset: Dataset) -> Scores:
    """As `StageTrainer.evaluate` on one worker."""
    device = "cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu"
    dtype = torch.float64 if config.engine.precision == "float64" else torch.float32
    ensemble = model.ensemble.to(device, dtype).eval()
    aggregator = build("aggregator", config.method.aggregator)
    batches = EvalBatches(store, dataset.config, config.run.evaluation_batch_size, device=device, dtype=dtype)
    autocast = config.engine.precision == "autocast"
    scores = Scores()
    for images_B3HW, labels_B in batches:
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            logits_EBC = ensemble(images_B3HW)
        members = dict(zip(config.method.expert_names, logits_EBC.unbind(), strict=True))
        scores.update({"ensemble": aggregator(logits_EBC), **members}, labels_B)
    return scores


def _shown(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Without the word on selection where it would claim that the split was not looked at."""
    same = evaluation["selected_on"] == evaluation["split"] == "val"
    return {key: value for key, value in evaluation.items() if not (same and key == "selected_on")}


def _keep(folder: Path, name: str, evaluation: dict[str, Any]) -> str:
    path = folder / "evaluation" / f"{name}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(evaluation, indent=1) + "\n")
    except OSError as error:
        return f"not kept: {path} cannot be written ({error.strerror})"
    return f"kept as {path}"
