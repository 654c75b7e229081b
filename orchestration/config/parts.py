"""Recipes from parts: which layers make a recipe, and in which order they lie.

    configs/config.yaml, dataset, backbone, cluster
    method                 its file; a recipe `of` others has theirs first
    protocol, pace         optimiser and schedule; epochs, batch sizes
    method on ...          what the method's file says of this data set or protocol
    mix, mix on ...        changes to the stages that learn the trunk; null takes off their mixing
    then, then on ...      further stages, from the last one before them
    command line

Later ones win. What a recipe says in `of` comes before the rest of its own file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.config.folders import path_of
from orchestration.config.layers import STAGES, File, lay_block, lay_part, named_in, read_file, stages_that
from orchestration.config.like import SavedEnsemble
from orchestration.config.origins import Layered
from orchestration.config.words import NO_MIX, available


@dataclass(frozen=True)
class Step:
    """One file of a recipe's chain, or the `then` parts that start from the same stage."""

    kind: str
    """method, rest (of a recipe `of` others), mix, unmix (without a file) or then."""
    files: tuple[File, ...]


@dataclass(frozen=True)
class Recipe:
    """The chain of files that makes a recipe, and what they share.

    Attributes:
        steps: in the order in which they lie.
        dataset: name of the data set, for the blocks of `on`.
        protocol, pace: None without a method.
        backbone: the choice.
    """

    steps: tuple[Step, ...]
    dataset: str
    protocol: File
    pace: File
    backbone: str

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, as they lie."""
        shared = (self.protocol.name, self.pace.name)
        return tuple(
            name
            for step in self.steps
            for name in (*(file.name for file in step.files), *(shared if step.kind == "method" else ()))
        )

    def blocks(self, file: File) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the blocks of a file's `on` that apply, each with its name."""
        # A pace called as a data set is that of its images; on others it is borrowed, and the block is not meant.
        pace = () if self.pace.choice in available("dataset") else (self.pace.choice,)
        return file.blocks(self.dataset, self.protocol.choice, *pace)


def plan_recipe(
    method: str | None, mix: str | None, then: Sequence[str], dataset: str, chosen: Mapping[str, str], default: str
) -> Recipe:
    """Find the files of a recipe.

    Args:
        method: the choice; None where a saved run takes its place.
        mix, then: the parts of the command line.
        dataset: its name.
        chosen: choices of the command line for protocol, pace and backbone.
        default: the backbone where nobody names one.

    Raises:
        ValueError: a file is not YAML, or a recipe is made of itself.
    """
    steps = (*(_steps_of(method, ()) if method else ()), *_parts(mix, then))
    pace = read_file("pace", chosen.get("pace") or (dataset if dataset in available("pace") else "generic"))
    # The command line decides, then the outermost file: what it says of the data set before what it says in general.
    said = [content for step in reversed(steps) for file in step.files for content in _contents_for(file, dataset)]
    protocol = chosen.get("protocol") or _first(said, pace, "protocol") or "own"
    backbone = chosen.get("backbone") or _first(said, pace, "backbone") or default
    return Recipe(steps, dataset, read_file("protocol", protocol), pace, backbone)


def _contents_for(file: File, dataset: str) -> Iterator[dict[str, Any]]:
    yield from (block for _, block in file.blocks(dataset))
    yield file.content


def _first(said: Sequence[Mapping[str, Any]], pace: File, key: str) -> str | None:
    return next((name for content in (*said, pace.content) if (name := named_in(content, key))), None)


def _steps_of(method: str, trail: tuple[str, ...]) -> list[Step]:
    file = read_file("method", method)
    of = file.content.get("of")
    if of is None:
        return [Step("method", (file,))]
    if method in trail:
        raise ValueError(f"{path_of('method', method)}: made `of` itself by way of {', '.join(trail)}")
    return [
        *_steps_of(of["method"], (*trail, method)),
        *_parts(of.get("mix"), of.get("then", ())),
        Step("rest", (file,)),
    ]


def _parts(mix: str | None, then: Sequence[str]) -> list[Step]:
    steps = [Step("unmix", ()) if mix == NO_MIX else Step("mix", (read_file("mix", mix),))] if mix else []
    return [*steps, Step("then", tuple(read_file("then", part) for part in then))] if then else steps


def lay_recipe(layered: Layered, recipe: Recipe, like: SavedEnsemble | None) -> bool:
    """Lay a recipe's files.

    Returns:
        Whether mix=null took off a mixing.

    Raises:
        ValueError: a `then` part does not fit what comes before it.
    """
    has_method, unmixed = any(step.kind == "method" for step in recipe.steps), False
    if like is not None and not has_method:
        like.lay(layered)
    for step in recipe.steps:
        if step.kind == "then":
            _lay_then(layered, step, recipe, None if has_method else like)
            continue
        if step.kind == "unmix":
            unmixed = _unmix(layered)
            continue
        [file] = step.files
        if step.kind == "mix" and not stages_that(layered, learns_trunk=True):
            raise ValueError(f"mix={file.choice}: no stage of the recipe learns the trunk; leave it out")
        before = set(layered.get(STAGES) or {})
        lay_block(layered, file.content, file.name)
        if step.kind == "method":
            for shared in (recipe.protocol, recipe.pace):
                _lay_all(layered, shared, recipe)
        else:
            _lay_pace(layered, recipe, [name for name in layered.get(STAGES) or {} if name not in before])
        for name, block in recipe.blocks(file):
            lay_block(layered, block, name)
        if step.kind == "method" and like is not None:
            like.lay(layered)
    return unmixed


def _unmix(layered: Layered) -> bool:
    """Take the mixing off the stages that learn the trunk; return whether one had any."""
    mixed = [name for name in stages_that(layered, learns_trunk=True) if layered.get((*STAGES, name, "mixing"))]
    for name in mixed:
        layered.put((*STAGES, name, "mixing"), None, "mix=null")
    return bool(mixed)


def _lay_all(layered: Layered, file: File, recipe: Recipe) -> None:
    lay_block(layered, file.content, file.name)
    for name, block in recipe.blocks(file):
        lay_block(layered, block, name)


def _lay_pace(layered: Layered, recipe: Recipe, stages: Sequence[str]) -> None:
    """Lay the pace of later stages on those of a recipe that came after its protocol and pace."""
    for stage in stages:
        if layered.get((*STAGES, stage, "epochs")) != 0:
            layered.lay(recipe.pace.content.get("second", {}), recipe.pace.name, (*STAGES, stage))


def _lay_then(layered: Layered, step: Step, recipe: Recipe, like: SavedEnsemble | None) -> None:
    stages = list(layered.get(STAGES) or {})
    start: dict[str, Any] = {}  # unset, a stage follows the one before it and starts from its weights
    if like is not None:
        start = {"after": [], "start_from": {"run": str(like.folder)} | ({"final": like.final} if like.final else {})}
    elif step.files[1:]:
        start = {"after": [stages[-1]], "start_from": {"stage": stages[-1]}}
    for file in step.files:
        stage = file.choice
        if stage in stages:
            raise ValueError(
                f"then={stage}: the recipe has a stage {stage} already: {', '.join(stages)}; leave out the part, or "
                f"name another method"
            )
        layered.lay(start, file.name, (*STAGES, stage))
        lay_part(layered, file.content, file.name, stage)
        _lay_pace(layered, recipe, [stage])
        for name, block in recipe.blocks(file):
            lay_part(layered, block, name, stage)
