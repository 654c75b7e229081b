"""`method.like`: a recipe that takes its network from a saved run, and starts from its weights.

The exported model says what the network is made of. This reads the run folder's JSON and YAML itself, because what it
finds decides what the config is.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experts.registry import piece
from orchestration.config.origins import Layered
from orchestration.config.paths import expand
from orchestration.config.renamed import with_new_keys

SAVED_RUN = "saved run"
"""The origin of what is taken over."""
_OWN_CLASSES = {"digits": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
"""Sources whose classes are known without opening them."""


@dataclass(frozen=True)
class SavedEnsemble:
    """A finished run, as far as a recipe takes it over.

    Attributes:
        folder: of the run, absolute.
        final: of its final stages, the one asked for; None for its last stage.
        finals: all of them, where it has several.
        model: contents of the exported model's model.json.
        config: contents of config.yaml.
    """

    folder: Path
    final: str | None
    finals: tuple[str, ...]
    model: dict[str, Any]
    config: dict[str, Any]

    @property
    def method(self) -> str:
        """Name of the run's recipe."""
        return str(self.config["method"]["name"])

    def lay(self, layered: Layered) -> None:
        """Lay what the ensemble is made of: backbone, experts, head and aggregator.

        A router is not among it: a stage that starts from the run trains none, so all experts answer.
        """
        model = self.model
        aggregator = model["aggregator"]
        if piece("aggregator", aggregator["name"]).needs_router:
            aggregator = self.config["method"]["aggregator"]
        made_of = {
            "like": str(self.folder),
            "like_final": self.final,
            "num_experts": len(model["expert_names"]),
            "experts": list(model["expert_names"]),
            **{key: model[key] for key in ("head", "shared_head", "reduce_dimension")},
            "aggregator": aggregator,
            "calibration": model.get("calibration"),
            "attention": model.get("attention"),
        }
        for key, value in made_of.items():
            _put_leaves(layered, ("method", key), value, SAVED_RUN)
        _put_leaves(layered, ("backbone",), model["backbone"], SAVED_RUN)

    def lay_data(self, layered: Layered) -> None:
        """Lay the run's data set and seed."""
        layered.put(("seed",), self.config["seed"], SAVED_RUN)
        data = self.config["dataset"]
        inside = os.path.join(data.get("root") or "", "")
        # Lists that lie in root follow it where the command line names another.
        lists = {key: value[len(inside) :] for key, value in data.items()
                 if key.endswith("_list") and value and inside and value.startswith(inside)}  # fmt: skip
        _put_leaves(layered, ("dataset",), data | lists, SAVED_RUN)

    def other_classes(self, dataset: Any) -> str | None:
        """Return why a data set has other classes than the run's, as far as the configs tell; None if it may not."""
        if not isinstance(dataset, dict):
            return None
        source, own = dataset.get("source"), self.config["dataset"]["source"]
        count = _OWN_CLASSES.get(str(source), dataset.get("num_classes"))
        names = self.model["class_names"]
        known = source in _OWN_CLASSES and own in _OWN_CLASSES
        if (known and source != own) or (count is not None and count != len(names)):
            found = f"{count} classes" if count != len(names) else "other classes"
            return (
                f"method.like = {self.folder}: its model knows {len(names)} classes ({', '.join(names[:3])}, ...), "
                f"dataset {dataset.get('name')} has {found}; needed the run's own; leave out "
                f"dataset=, or name a run on that data set"
            )
        return None


def _put_leaves(layered: Layered, path: tuple[str, ...], value: Any, origin: str) -> None:
    """Put a value in place of what was there; of a mapping, its keys one by one, so that each has its origin."""
    if not isinstance(value, dict) or not value:
        layered.put(path, value, origin)
        return
    layered.put(path, {}, origin)
    layered.lay(value, origin, path)
    layered.origins.pop(path, None)


def saved_ensemble(run: str, final: str | None = None) -> SavedEnsemble:
    """Read what a saved run's ensemble is made of.

    Args:
        run: folder of a finished run.
        final: of its final stages, where it has several; None for its last stage.

    Raises:
        ValueError: there is no such run or final stage, it is not finished, or its model or config cannot be read.
    """
    folder = Path(os.path.abspath(expand(run)))
    said = f"method.like = {run}"
    if not (folder / "config.yaml").is_file():
        gone = "the folder holds no run" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{said}: {gone}; needed the folder of a finished run, as runs/<run.name>")
    status = _read_json(folder / "run.json", said).get("status")
    if status != "finished":
        raise ValueError(
            f"{said}: the run is {status or 'not started'}; needed a finished one: "
            f"if it has stopped, give its command again"
        )
    finals = tuple(sorted(path.parent.parent.name for path in folder.glob("export/*/last/model.json")))
    if final is not None and final not in finals:
        has = f"it has {', '.join(finals)}" if finals else "it has one result; leave it out"
        raise ValueError(f"method.like_final = {final}: no final stage of {run}; {has}")
    path = folder.joinpath("export", *([final] if final else []), "last", "model.json")
    if not path.is_file():
        raise ValueError(f"{said}: it has no {path.relative_to(folder)}; needed its exported model; restore the folder")
    model = _read_json(path, said)
    try:
        config = with_new_keys(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))  # type: ignore[arg-type]
        ensemble = SavedEnsemble(folder, final, finals, model, config)
        trial = Layered()
        ensemble.lay(trial)
        ensemble.lay_data(trial)
        ensemble.other_classes(trial.tree["dataset"])
    except Exception as error:  # of YAML, or a key that is not there
        raise ValueError(
            f"{said}: {folder / 'config.yaml'} and {path.relative_to(folder)} do not describe a run of this version "
            f"({type(error).__name__}: {error})"
        ) from error
    return ensemble


def _read_json(path: Path, said: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{said}: {path.name} cannot be read ({type(error).__name__}); restore the folder") from error
    return content if isinstance(content, dict) else {}
