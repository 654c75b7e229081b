"""A saved run opened for measuring: its exported model, its data, its config; results written beside it.

`expertail evaluate` and `expertail regions` work on it, in their own process.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aggregation.aggregator import Outputs
from aggregation.serving import ServedModel, load_model
from experts.batches import Replica
from experts.data.dataset import Dataset, open_dataset
from experts.data.fingerprints import of_read, of_states, replaced, touched
from experts.data.images import FileImages, ImageStore
from experts.eval_batches import EvalBatches
from orchestration.config.compose import from_yaml
from orchestration.config.list_paths import absolute_lists, moved_lists
from orchestration.config.messages import say
from orchestration.config.paths import expand
from orchestration.config.problems import check
from orchestration.config.run_config import RunConfig
from orchestration.config.words import parse
from orchestration.storage.files import CONFIG, DATA, RUN, read_json, write_json
from orchestration.training.precision import casting, use_precision

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


@dataclass(frozen=True)
class SavedRun:
    """A run folder opened for measuring.

    Attributes:
        folder: of the run.
        config: as trained, except for where the data is and how it is read.
        data: contents of data.json.
        which: "best" or "last", the model that is measured.
        stage: the final stage that the model is of, where the recipe has several; "" where it has one.
        model: loaded, on the device, in the precision of the run.
        split: "test" or "val".
        store: the images of the split.
        dataset: the run's.
        device, dtype: where and in which precision to compute.
    """

    folder: Path
    config: RunConfig
    data: dict[str, Any]
    which: str
    stage: str
    model: ServedModel
    split: str
    store: ImageStore
    dataset: Dataset
    device: torch.device
    dtype: torch.dtype

    @property
    def cuts(self) -> list[int] | None:
        """The two indices that separate the groups by index; None where the dataset has no such groups."""
        return list(self.config.dataset.index_groups) if self.config.dataset.index_groups else None

    @property
    def final(self) -> str:
        """The stage that the model is of."""
        return self.stage or self.config.method.final

    @property
    def title(self) -> str:
        """The run's name, and the stage that the model is of where there are several."""
        return f"{self.folder.name}, stage {self.stage}" if self.stage else self.folder.name

    def classes_named(self, words: Sequence[int | str], key: str) -> list[int]:
        """Return the ids of classes that are named by id or name, each once.

        Args:
            words: ids or names.
            key: the option or key that they come from, for messages.

        Raises:
            ValueError: there is no such class, or it has no test image; names it.
        """
        names, found = [str(name) for name in self.data["class_names"]], []
        for word in words:
            text = str(word)
            place = names.index(text) if text in names else int(text) if text.isdecimal() else -1
            if not 0 <= place < len(names):
                raise ValueError(
                    f"{key}: no class {text!r}; needed ids from 0 to {len(names) - 1}, or names such as "
                    f"{', '.join(names[:3])}"
                )
            if place not in self.store.labels:
                raise ValueError(f"{key}: class {text} has no {self.split} image to show; leave it out")
            found.append(place)
        return list(dict.fromkeys(found))

    def with_model(self, which: str, stage: str) -> SavedRun:
        """Return the same run with another of its models; arguments as for `open_run`."""
        model = _load_model(self.folder, which, stage)
        model.ensemble.to(self.device, self.dtype).eval()
        return replace(self, which=which, stage=stage, model=model)

    def save(self, name: str, result: dict[str, Any]) -> str:
        """Write evaluation/<name>.json, below the stage's folder where there are several.

        Returns:
            A line that says where, or why it could not be written.
        """
        return save_evaluation(self.folder, f"{self.stage}/{name}" if self.stage else name, result)

    def origin(self) -> dict[str, Any]:
        """Return the head of every result: split, selection, stage, epoch, step, what was fitted, which weights."""
        trained = read_json(self.folder / "evaluation" / self.stage / f"{self.which}.json")
        model = {key: trained.get(key) for key in ("selected_on", "stage", "epoch", "step")}
        fitted = {"fitted": trained["fitted"]} if "fitted" in trained else {}
        return {"split": self.split, **model, **fitted, "weights": self.which}

    def batches(self) -> EvalBatches:
        """Return the split in its own order, in batches of run.evaluation_batch_size."""
        size = self.config.evaluation_batch_size(self.device.type)
        return EvalBatches(self.store, self.dataset.config, size, Replica(device=self.device, dtype=self.dtype))

    def outputs(self, images_B3HW: Tensor) -> Outputs:
        """Run the ensemble on prepared images, in the precision of the run."""
        with casting(self.config.engine, self.device):
            return self.model.outputs(images_B3HW)


def stages_to_measure(run: str, asked: str | None) -> list[str]:
    """Return the final stages to measure: the one asked for, or all that are trained; "" for the run's only one.

    Raises:
        ValueError: there is no such run, it has no such final stage, or has not reached it.
    """
    folder = expand(run)
    method = _stored_config(folder).method
    finals = method.finals
    if asked is not None and asked not in finals:
        near = difflib.get_close_matches(asked, finals, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        found = "others begin with it or learn from it" if asked in method.stages else "no such stage"
        raise ValueError(f"--stage {asked}: {found}; {hint}needed a final stage of the run: {', '.join(finals)}")
    if len(finals) > 1:
        return [asked] if asked else [s for s in finals if (folder / "export" / s).is_dir()] or [""]
    if asked is not None:
        reached = read_json(folder / "evaluation" / "last.json").get("stage")
        if reached != asked:
            raise ValueError(
                f"--stage {asked}: it has not begun (reached: {reached or 'nothing'}); train the run to its end first"
            )
    return [""]


def open_run(
    run: str, which: str, split: str, overrides: list[str], stage: str = "", *, files_known: bool = False
) -> SavedRun:
    """Load the model of a saved run and the data that it was trained from.

    Args:
        run: the run folder.
        which: "best" or "last", of its models.
        split: "test" or "val".
        overrides: `a.b=value` for keys of MAY_DIFFER.
        stage: whose model, as `stages_to_measure` returns it.
        files_known: this start has compared the files with the run's already, so they are not read for that again.

    Raises:
        ValueError: there is no such run, it has no model yet, a file is damaged, an override would change what is
            measured, or the data is not the run's.
    """
    # From the quickest check to the slowest: config, model, data.
    folder = expand(run)
    config = _with_overrides(_stored_config(folder), overrides)
    data = read_json(folder / DATA)
    model = _load_model(folder, which, stage)
    store, dataset = _open_split(folder, config, data, split, files_known)
    device = torch.device("cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu")
    dtype = torch.float64 if config.engine.precision == "float64" else torch.float32
    model.ensemble.to(device, dtype).eval()
    use_precision(config.engine, device)
    return SavedRun(folder, config, data, which, stage, model, split, store, dataset, device, dtype)


def open_last(run_dir: Path, *, files_known: bool = False) -> SavedRun:
    """Open a run with its last model and its test images, of several final stages the last; see `open_run`."""
    stage = stages_to_measure(str(run_dir), None)[-1]
    return open_run(str(run_dir), "last", "test", [], stage, files_known=files_known)


@contextmanager
def same_threads(config: RunConfig) -> Iterator[None]:
    """Compute on as many CPU threads as the run did: their number changes results in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.engine.threads or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stored_config(folder: Path) -> RunConfig:
    if not folder.exists():
        near = difflib.get_close_matches(folder.name, _neighbours(folder.parent), 1)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
        raise ValueError(f"{folder}: nothing there; needed the folder of a run, e.g. runs/<run.name>{hint}")
    if not (folder / CONFIG).is_file():
        found = "a folder without config.yaml" if folder.is_dir() else "a file"
        raise ValueError(f"{folder}: found {found}; needed the folder of a run, which `expertail train` makes")
    return from_yaml(folder / CONFIG)


def _neighbours(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if (path / CONFIG).is_file()] if parent.is_dir() else []


def _with_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    choices, then, values = parse(overrides)
    refused = [f"{group}={choice}" for group, choice in choices.items()] + [f"then={part}" for part in then]
    tree: dict[str, Any] = config.model_dump(mode="json")
    # All refused words are collected, so that one message names them.
    for value in values:
        if value.key_or_group not in MAY_DIFFER:
            refused.append(f"{value.key_or_group}={value.value()}")
            continue
        section, key = value.key_or_group.split(".")
        tree[section][key] = value.value()
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: cannot be changed for a trained run, because its config made the model what it is; "
            f"only where the data is and how it is read may differ: {', '.join(MAY_DIFFER)}"
        )
    if not any(value.key_or_group == "dataset.resident" for value in values):
        tree["dataset"]["resident"] = "never"  # a split is read once, and the training images not at all
    found = check(tree, " ".join(overrides) or "config.yaml")
    moved = moved_lists(found.dataset, config.dataset.root)
    for value in values:
        moved.pop(value.key_or_group.partition(".")[2], None)
    data = found.dataset.model_copy(update=moved)
    return found.model_copy(update={"dataset": data.model_copy(update=absolute_lists(data))})


def _load_model(folder: Path, which: str, stage: str) -> ServedModel:
    export = folder / "export" / stage / which
    if not export.is_dir():
        status = read_json(folder / RUN)
        command = status.get("command") or "the command that started it"
        raise ValueError(
            f"{export}: there is no model yet, the run is {status.get('status', 'not known to have started')}; "
            f"needed a run that reached its end or run.max_steps; this continues it: {command}"
        )
    return load_model(export)


def _open_split(
    folder: Path, config: RunConfig, data: dict[str, Any], split: str, files_known: bool = False
) -> tuple[ImageStore, Dataset]:
    """Open the dataset, compare its digest with the run's, and return the split and the dataset."""
    if not data.get("digest"):
        raise ValueError(
            f"{folder / DATA}: missing or without a digest; needed to recognise the run's data; restore the file"
        )
    # Images that the run left out as unreadable are left out again, or the digest would not be the run's.
    dataset = open_dataset(config.dataset, left_out=[item["path"] for item in data.get("left_out", [])])
    if dataset.digest != data["digest"]:
        total = data.get("total", "?")
        raise ValueError(
            f"dataset.root = {dataset.config.root}: this is not the data of the run: found digest "
            f"{dataset.digest[:12]} ({int(dataset.counts_C.sum())} training images), needed {data['digest'][:12]} "
            f"({total}); set dataset.root to the folder that the run was trained from"
        )
    store = dataset.test if split == "test" else dataset.val
    if not files_known:
        _refuse_replaced(dataset, split, store, data.get("files", {}))
    if store is None:
        raise ValueError(
            f"--split {split}: the run's dataset {config.dataset.name} has no validation set; use --split test"
        )
    return store, dataset


def _refuse_replaced(dataset: Dataset, split: str, store: ImageStore | None, files: Mapping[str, Any]) -> None:
    """Refuse to measure files that hold other data than the run's, under the same names."""
    name = {"test": "test", "val": "validation"}[split]
    old, new = files.get(name), dataset.contents.get(name)
    if old is None:  # images of an array, or a run of an older version
        return
    if new is None and isinstance(store, FileImages):
        new = of_read(store.files) if "contents" in old else of_states(store.files)
    if new is None:
        return
    if problem := replaced(name, old, new):
        raise ValueError(
            f"dataset.root = {dataset.config.root}: this is not the data of the run: {problem}; set dataset.root to "
            f"the folder that the run was trained from"
        )
    if doubt := touched(name, old, new):
        say(doubt)


def save_evaluation(folder: Path, name: str, evaluation: dict[str, Any]) -> str:
    """Write evaluation/<name>.json. Return a line that says where, or why it could not be written."""
    path = folder / "evaluation" / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, evaluation)
    except OSError as error:
        # A run folder may be read-only for whoever measures it; the table is printed all the same.
        return f"not saved: {path} cannot be written ({error.strerror})"
    return f"saved as {path}"
