"""Recipes carried out in one process on small digits, for tests that compare devices.

Such tests take seconds per recipe. So `make test` tries the recipes that have a part which no other one tried has, see
`chosen`; the others are drills.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from aggregation.metrics import Scores
from aggregation.serving import TrainingData, export_model
from experts.data.dataset import Dataset, open_dataset
from experts.ensemble import TRAINING_ONLY, build_ensemble, part_of
from orchestration.config.compose import load_config
from orchestration.config.recipe import Recipe as RecipeConfig
from orchestration.config.recipe import StageConfig
from orchestration.config.run_config import RunConfig
from orchestration.config.words import available
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

WORDS = [
    "dataset=digits_lt", "dataset.image_size=8", "engine.name=torch", "tracking.enabled=false",
    "run.evaluation_batch_size=60",  # the same batches on every device
]  # fmt: skip
AS_ON_A_GPU = "engine.memory_format=contiguous"
"""The format that "auto" is there for float32; with it a CPU has the bits of an emulated GPU."""
QUICK = {"ride", "ace"}
"""Recipes that `make unit` tries: one whose rule asks for no numbers of the experts, one whose rule does."""
_NUMBERS = {"epochs", "batch_size", "optimizer", "lr_schedule", "sampler", "objective"}
"""Keys of nearly every stage. Those of them that are pieces count by name."""


def parts_of(method: str) -> set[Hashable]:
    """Return what a recipe is made of: its pieces by name, and which other keys it and its stages set."""
    recipe = load_config([f"method={method}", *WORDS]).method
    parts: set[Hashable] = {("one expert", recipe.num_experts == 1)}
    parts |= set(_pieces(recipe.model_dump(exclude={"name", "expected"})))
    parts |= {("method", key) for key in _set_by(recipe, RecipeConfig) - {"name", "expected", "experts"}}
    for stage in recipe.stages.values():
        parts |= {("steps", stage.epochs > 0), *(("stage", key) for key in _set_by(stage, StageConfig) - _NUMBERS)}
    return parts


def _pieces(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and name of every piece in a config, wherever it is."""
    if isinstance(value, dict):
        if "name" in value:
            yield key, value["name"]
        for inner, item in value.items():
            yield from _pieces(item, inner)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _pieces(item, key)


def _set_by(config: Any, schema: Any) -> set[str]:
    """Return the keys of a config that have another value than the schema's default."""
    defaults = {
        key: field.get_default(call_default_factory=True)
        for key, field in schema.model_fields.items()
        if not field.is_required()
    }
    return {key for key, default in defaults.items() if getattr(config, key) != default}


def chosen(parts: Mapping[str, set[Hashable]], first: Sequence[str]) -> list[str]:
    """Return some names that together have every part: the first ones, then always the one with most new parts."""
    found = list(first)
    left = sorted(set(parts) - set(found))
    while True:
        seen = set().union(*(parts[name] for name in found))
        best = max(left, key=lambda name: len(parts[name] - seen), default=None)
        if best is None or parts[best] <= seen:
            return found
        found.append(best)
        left.remove(best)


PARTS = {method: parts_of(method) for method in available("method")}
TRIED = chosen(PARTS, sorted(QUICK))
"""Recipes that `make test` tries."""


def marks(method: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a test that takes seconds with a recipe."""
    if method in QUICK:
        return []
    return [pytest.mark.slow] if method in TRIED else [pytest.mark.slow, pytest.mark.drill]


every_recipe = pytest.mark.parametrize("method", [pytest.param(method, marks=marks(method)) for method in PARTS])


@lru_cache
def digits(val_per_class):
    """Open the digits, with so many validation images per class."""
    config = load_config(["method=ce", *WORDS]).dataset
    return open_dataset(config.model_copy(update={"val_per_class": val_per_class}))


def export(folder, config, stage, dataset, *, names=None, state=None, image_shape=(8, 8, 1)):
    """Write a stage's ensemble as a served folder; untrained where no state is given."""
    ensemble = config.ensemble(stage, dataset.num_classes)
    ensemble = replace(ensemble, expert_names=names or ensemble.expert_names)
    data = TrainingData(
        dataset=config.dataset,
        class_names=dataset.class_names,
        counts=dataset.counts_C.tolist(),
        image_shape=image_shape,
    )
    state = build_ensemble(ensemble, seed=1).state_dict() if state is None else state
    rule, probabilities = config.method.aggregator_in(stage), config.method.gives_probabilities(stage)
    export_model(folder, state, ensemble, rule, data, gives_probabilities=probabilities)
    return str(folder)


class Recipe:
    """The stages of a recipe in one process, each from the weights that it begins with."""

    def __init__(self, method: str, folder: Path, *words: str, mesh: Callable[[RunConfig], Mesh]) -> None:
        self.config = load_config([f"method={method}", *WORDS, *words])
        self.dataset = digits(self.config.dataset.val_per_class)
        self.folder, self.mesh = folder, mesh

    def trainers(self):
        """Yield a trainer for every stage, ready for its first step; what it holds afterwards starts later stages."""
        for stage in self.config.method.stages:
            teachers = teachers_of(self.config, stage, self.dataset, self.folder)
            trainer = StageTrainer(self.config, stage, self.dataset, self.mesh(self.config), teachers)
            source = self.config.method.starts_from(stage)
            if source is not None:
                trainer.start_from(str(self.folder / source.stage))
            if trainer.training is not None:
                trainer.prepare()
            else:
                trainer.fit()
            yield trainer
            place = self.folder / stage
            place.mkdir(exist_ok=True)
            trainer.save(str(place))
            self._export(trainer, stage)
            trainer.close()

    def _export(self, trainer, stage):
        whole = build_ensemble(self.config.ensemble(stage, trainer.setup.dataset.num_classes), seed=1).state_dict()
        held = {name: value.cpu() for name, value in trainer.setup.model.state_dict().items()}
        state = {**whole, **{name: value for name, value in held.items() if part_of(name) not in TRAINING_ONLY}}
        export(self.folder / f"{stage}.export", self.config, stage, trainer.setup.dataset, state=state)


def teachers_of(config: RunConfig, stage: str, dataset: Dataset, folder: Path) -> dict[str, str]:
    """Return the folders of a stage's teachers, by name; those of earlier stages are exported as `<stage>.export`."""
    found = {}
    for name, teacher in config.method.stages[stage].teachers.items():
        found[name] = str(folder / f"{teacher.stage}.export")
        if teacher.run is not None:  # of another run; here an untrained one, twice as large
            names = [f"teacher{i}" for i in range(2 * config.method.num_experts)]
            found[name] = export(folder / "teacher", config, stage, dataset, names=names)
    return found


def saved_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a folder of safetensors, by file and name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= {f"{path.stem}:{name}": t.numpy() for name, t in load_file(path).items()}
    return tensors


def numbers(
    method: str,
    folder: Path,
    device: str,
    *words: str,
    watch: Callable[[StageTrainer], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> list[Any]:
    """Return losses, terms and the test's results of every stage; saved and loaded half-way.

    Args:
        watch: takes a stage's trainer to a context for its evaluation.
    """
    found = []
    folder.mkdir()
    recipe = Recipe(
        method, folder, *words, mesh=lambda config: Mesh(mesh_shape(config.method.num_experts, 1), device=device)
    )
    for trainer in recipe.trainers():
        if trainer.training is not None:
            first = trainer.train(1)
            half = folder / "half"
            half.mkdir(exist_ok=True)
            trainer.save(str(half))
            trainer.load(str(half), trainer.state())
            left = trainer.setup.steps_per_epoch - trainer.done % trainer.setup.steps_per_epoch
            second = trainer.train(trainer.done + min(2, left))
            found += [first.losses, first.terms, second.losses, second.terms]
        with watch(trainer):
            scores, diversity = trainer.evaluate("test")
        result = Scores.from_state(scores).result(trainer.setup.dataset.counts_C.tolist(), None)
        found += [result["members"], {name: value.tolist() for name, value in diversity.items()}]
    return found
