"""From the words of a command line to a valid config.

words -> choices of files, and values for single keys          words.py
      -> layers of YAML, each value with its origin            parts.py, layers.py, origins.py
      -> values of the command line
      -> percentages of a stage as whole epochs                percentages.py
      -> pieces in the place of names of stacks                stacks.py
      -> a frozen RunConfig, all problems at once              problems.py
      -> paths made absolute

Hydra reads the words; the layers are ours, because Hydra knows neither where a value comes from nor that a piece's keys
go with the piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from orchestration.config.folders import configs_folder, with_path
from orchestration.config.layers import STAGES, read_file, read_yaml
from orchestration.config.like import SAVED_RUN, SavedEnsemble, saved_ensemble
from orchestration.config.list_paths import absolute_lists, unread_lists
from orchestration.config.origins import COMMAND_LINE, Layered
from orchestration.config.parts import lay_recipe, plan_recipe
from orchestration.config.paths import expand
from orchestration.config.percentages import Resolved, resolve_percentages
from orchestration.config.problems import check
from orchestration.config.recipe import ModelSource
from orchestration.config.renamed import with_new_keys
from orchestration.config.run_config import RunConfig
from orchestration.config.secrets import redact
from orchestration.config.stacks import resolve_stacks
from orchestration.config.words import NO_MIX, UNMIXED, Words, message, parse, title

S = TypeVar("S", bound=BaseModel)
Source = TypeVar("Source", bound=ModelSource)
_LIKE = "method.like"
_VARIABLES = {"uri": "MLFLOW_TRACKING_URI", "experiment": "MLFLOW_EXPERIMENT_NAME"}
"""MLflow's own, by the key of `tracking` that they are a default of."""


@dataclass(frozen=True)
class Composed:
    """A config with the story of its values.

    Attributes:
        config: valid.
        layered: the values as they were written, each with its origin; percentages are whole epochs already.
        files: names of the files that made it, group/choice, as they lie.
        resolved: what became of each percentage.
        notes: lines about what the command line scaled.
    """

    config: RunConfig
    layered: Layered
    files: tuple[str, ...]
    resolved: tuple[Resolved, ...]
    notes: tuple[str, ...]


def load_config(words: list[str]) -> RunConfig:
    """Compose and validate a run's config; see `compose`."""
    return compose(words).config


def compose(words: list[str]) -> Composed:
    """Compose and validate a run's config.

    Args:
        words: `group=choice` and `a.b=value`.

    Raises:
        ValueError: everything that is wrong, one line each.
    """
    read = parse(words)
    try:
        layered, files, about_like = _lay_files(read)
    except ValueError as problem:
        raise ValueError(message(title(words), str(problem).splitlines())) from problem
    length = _lengths(layered)
    for override in sorted(read.values, key=_names_first):
        _lay_value(layered, override)
    resolved, problems = resolve_percentages(layered)
    problems += resolve_stacks(layered)
    if problems:
        raise ValueError(message(title(words), sorted(problems)))
    checked = check(layered.tree, title(words), lambda keys: _file_of(layered, keys))
    config = _with_absolute_paths(checked)
    unread = unread_lists(checked.dataset, absolute_lists(config.dataset))
    notes = (*about_like, *_notes(length, config, resolved), *unread, *_describe_environment(layered))
    return Composed(config, layered, files, tuple(resolved), notes)


def _lay_files(read: Words) -> tuple[Layered, tuple[str, ...], list[str]]:
    """Lay all files; returns their names and notes about a saved run, too."""
    layered = Layered()
    base = read_yaml(configs_folder() / "config.yaml")
    choices: dict[str, str] = base.pop("defaults") | read.choices
    layered.lay(base, "config.yaml")
    run, final = _value_of(read, _LIKE), _value_of(read, f"{_LIKE}_final")
    if final is not None and run is None:
        raise ValueError(f"{_LIKE}_final = {final}: of which run? set {_LIKE}=<folder of a finished run>, or remove it")
    like = None if run is None else saved_ensemble(run, final)
    if like is not None and "dataset" not in read.choices:
        like.lay_data(layered)
    else:
        data = read_file("dataset", choices["dataset"])
        layered.lay({"dataset": data.content}, data.name)
    if like is not None:
        _check_like(read, like, layered)
    cluster = read_file("cluster", choices["cluster"])
    layered.lay({"cluster": cluster.content}, cluster.name)
    for key, variable in _VARIABLES.items():
        if os.environ.get(variable):
            layered.put(("tracking", key), os.environ[variable], variable)

    method = choices["method"] if like is None or "method" in read.choices else None
    mix, dataset = read.choices.get("mix"), str(layered.get(("dataset", "name")))
    recipe = plan_recipe(method, mix, read.then, dataset, read.choices, choices["backbone"])
    parts = [part for part in (mix, *read.then) if part not in (None, NO_MIX)]
    layered.lay({"method": {"name": None}}, "the parts chosen")
    if like is None:
        backbone = read_file("backbone", recipe.backbone)
        layered.lay({"backbone": backbone.content}, backbone.name)
        made_of: tuple[str, ...] = (f"dataset/{dataset}", backbone.name)
    else:
        made_of = (f"saved run {like.folder}",)
        if method is None:
            layered.put(("run", "name"), _name_after(like, parts, read), SAVED_RUN)
    if lay_recipe(layered, recipe, like):
        parts.insert(0, UNMIXED)  # another recipe than the one of this name, with results of its own
    name = "+".join([method or (like.method if like else ""), *parts])
    layered.put(("method", "name"), name, "the parts chosen")
    _lay_published(layered, name, dataset)
    notes = [] if like is None else list(_notes_about(like, method, [*layered.get(STAGES)]))
    return layered, (*made_of, *recipe.files), notes


def _value_of(read: Words, key: str) -> str | None:
    """Return the last value that the command line gives a key; None if it gives none."""
    found = [override.value() for override in read.values if override.key_or_group == key]
    return str(found[-1]) if found and found[-1] is not None else None


def _notes_about(like: SavedEnsemble, method: str | None, stages: list[str]) -> Iterator[str]:
    """Say what is taken of a saved run where that may not be what was meant."""
    if method is not None:
        yield (
            f"{_LIKE}: {stages[0]} is trained anew, on a network made like that of {like.folder.name}; leave out "
            f"method={method} to go on from its weights"
        )
    elif like.finals and like.final is None:
        last = list(like.config["method"]["stages"])[-1]
        others = ", ".join(like.finals)
        yield f"{_LIKE}: goes on from its last stage, {last}; {_LIKE}_final= takes another of {others}"


def _name_after(like: SavedEnsemble, parts: Sequence[str], read: Words) -> str:
    """Return the name of a run that goes on from another one: ride-digits_lt-s0+crt."""
    seeds = [f"-s{value.value()}" for value in read.values if value.key_or_group == "seed"]
    return "+".join([like.folder.name, *parts]) + "".join(seeds[-1:])


def _check_like(read: Words, like: SavedEnsemble, layered: Layered) -> None:
    """Refuse what a saved run cannot be combined with.

    Raises:
        ValueError: what does not fit.
    """
    if "method" not in read.choices and not read.then:
        raise ValueError(
            f"{_LIKE} = {like.folder}: nothing to train; needed stages that start from the run, e.g. then=crt, or a "
            f"method= that trains an ensemble of the same make"
        )
    if "backbone" in read.choices:
        raise ValueError(f"backbone={read.choices['backbone']}: the backbone is the run's ({_LIKE}); leave it out")
    if problem := like.other_classes(layered.get(("dataset",))):
        raise ValueError(problem)


def _lay_published(layered: Layered, recipe: str, dataset: str) -> None:
    """Lay the published result of a recipe on a data set, if there is one."""
    table = read_yaml(configs_folder() / "published.yaml")
    found = table["results"].get(recipe, {}).get(dataset)
    if found is not None:
        conditions = table["conditions"].get(dataset, {}) | found.get("conditions", {})
        layered.put(("method", "expected"), found | {"conditions": conditions}, "published.yaml")


def _names_first(override: Override) -> tuple[bool, int]:
    """Sort the words that name pieces before those for the pieces' keys, whatever their order was."""
    keys = override.key_or_group.split(".")
    return keys[-1] != "name", len(keys) if keys[-1] == "name" else 0


def _lay_value(layered: Layered, override: Override) -> None:
    path, value = tuple(override.key_or_group.split(".")), override.value()
    place = layered.get(path[:-1])
    if isinstance(place, list) and path[-1].isdecimal() and int(path[-1]) < len(place):
        place[int(path[-1])] = value
        layered.origins[path[:-1]] = COMMAND_LINE
    elif path[-1] == "name" and path[1:]:  # as a mapping, so that another piece forgets the keys of the one before
        layered.lay({path[-2]: {"name": value}}, COMMAND_LINE, path[:-2])
    else:
        layered.lay({path[-1]: value}, COMMAND_LINE, path[:-1])


def _file_of(layered: Layered, keys: list[str]) -> str | None:
    """Return the file that wrote a key, for a problem to name it; None for the command line."""
    origin = layered.origin(keys)
    if origin is None:  # a mapping of several values
        path = tuple(keys)
        origin = next((found for known, found in layered.origins.items() if known[: len(path)] == path), None)
    return None if origin in (None, COMMAND_LINE) else with_path(origin)


def _lengths(layered: Layered) -> dict[str, Any]:
    """Return the epochs of every stage."""
    stages = layered.get(STAGES) or {}
    return {name: stage.get("epochs") for name, stage in stages.items()}


def _notes(length: dict[str, Any], config: RunConfig, resolved: Sequence[Resolved]) -> list[str]:
    """Say what came of the percentages of the stages whose number of epochs the command line changed."""
    notes = []
    for name, stage in config.method.stages.items():
        before = length.get(name)
        if before in (None, stage.epochs):
            continue
        scaled: dict[str, list[str]] = {}
        for found in resolved:
            if found.stage == name:
                became = f"{found.percentage} left out (the end)" if found.left_out else str(found.epochs)
                scaled.setdefault(found.key, []).append(became)
        parts = [f"{key} {', '.join(epochs)}" for key, epochs in scaled.items()]
        notes.append(
            f"stage {name}: {stage.epochs} instead of {before} epochs"
            + (f"; scaled: {'; '.join(parts)}" if parts else "")
        )
    return notes


def _describe_environment(layered: Layered) -> Iterator[str]:
    """Say what the environment decides about tracking."""
    for key, variable in _VARIABLES.items():
        if layered.origin(("tracking", key)) == variable and layered.get(("tracking", "enabled")) is not False:
            yield f"tracking.{key} = {redact(str(layered.get(('tracking', key))))} (from {variable})"


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make paths absolute: workers and later commands may run in other folders."""
    method = config.method
    stages = {
        name: stage.model_copy(
            update={
                "start_from": stage.start_from and _with_folder(stage.start_from),
                "teachers": {key: _with_folder(teacher) for key, teacher in stage.teachers.items()},
            }
        )
        for name, stage in method.stages.items()
    }
    method = _with_absolute(_with_absolute(method.model_copy(update={"stages": stages}), "backbone_weights"), "like")
    data = _with_absolute(config.dataset, "root")
    data = data.model_copy(update=absolute_lists(data))
    return config.model_copy(update={"method": method, "dataset": data})


def _with_folder(source: Source) -> Source:
    return source if source.sibling is not None else _with_absolute(source, "run")


def _with_absolute(settings: S, key: str) -> S:
    path = getattr(settings, key)
    return settings if path is None else settings.model_copy(update={key: os.path.abspath(expand(path))})


def to_yaml(config: RunConfig) -> str:
    """Return the resolved config as plain YAML; `from_yaml` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def from_yaml(path: Path) -> RunConfig:
    """Read a run's config.yaml. The run.dir of a run that names siblings is where its folder lies now.

    Raises:
        ValueError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a run's config ({_first_line(error)})") from error
    except Exception as error:  # the YAML parser's own errors have no common base outside its package
        raise ValueError(f"{path}: not YAML ({_first_line(error)})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: found {type(tree).__name__}, needed a mapping")
    config = check(with_new_keys(tree), str(path))  # type: ignore[arg-type]
    if any(source.sibling for stage in config.method.stages.values() for source in stage.sources):
        here = os.path.abspath(path.parent.parent)  # its folder may have moved, and its siblings with it
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": here})})
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
