"""Stacks of augmentations by name: the pieces of configs/augment/<name>.yaml in the place of the name.

    dataset.augment.name=randaugment            every stage
    method.stages.<s>.augment.name=simclr       one stage
    method.stages.<s>.views=[moco]              a further view
    dataset.augment.randaugment.magnitude=5     a key of one of the stack's pieces

A file has `pieces`, or `small` for images up to 64 pixels and `large` for others; `on` has the same for one data set.
"standard" is the data set's own augmentation, as its keys say.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from experts.data.config import Augment
from experts.registry import registered_names
from orchestration.config.folders import path_of
from orchestration.config.layers import STAGES, read_file
from orchestration.config.origins import COMMAND_LINE, Layered, Path
from orchestration.config.words import available

STANDARD = "standard"
SMALL_IMAGE = 64  # pixels, of the side
DATASET: Path = ("dataset", "augment")


class _Data(NamedTuple):
    """All that a stack depends on: name of the data set, side of its images as configured, its own augmentation."""

    name: str
    image_size: Any
    standard: Any


def resolve_stacks(layered: Layered) -> list[str]:
    """Put pieces in the place of all names of stacks.

    Returns:
        Problems, one line each.
    """
    given = layered.get(DATASET)
    keys = {key: value for key, value in given.items() if key != "name"} if isinstance(given, dict) else given
    standard = {"pieces": keys} if isinstance(keys, list) else keys
    data = _Data(str(layered.get(("dataset", "name"))), layered.get(("dataset", "image_size")), copy.deepcopy(standard))
    problems = list(_resolve(layered, DATASET, data))
    stages = layered.get(STAGES)
    for name, stage in (stages if isinstance(stages, dict) else {}).items():
        if not isinstance(stage, dict):
            continue
        problems += _resolve(layered, (*STAGES, name, "augment"), data)
        problems += _resolve_views(layered, (*STAGES, name, "views"), data)
    return problems


def _resolve_views(layered: Layered, path: Path, data: _Data) -> Iterator[str]:
    views = layered.get(path)
    if not isinstance(views, list):
        return
    origin = layered.origin(path) or COMMAND_LINE
    for number, view in enumerate(views):
        # Each as if it lay alone, so that it knows no origins but one.
        alone = Layered()
        alone.put(("view",), view, origin)
        if isinstance(view, Mapping):
            alone.lay({"view": view}, origin)
        problems = list(_resolve(alone, ("view",), data))
        yield from (problem.replace("view", ".".join((*path, str(number))), 1) for problem in problems)
        views[number] = alone.get(("view",))


def _resolve(layered: Layered, path: Path, data: _Data) -> Iterator[str]:
    """Put pieces in the place of one name; yield why that is not possible."""
    value = layered.get(path)
    origin = layered.origin(path) or COMMAND_LINE
    if isinstance(value, list):
        layered.put(path, {"pieces": value}, origin)
    if isinstance(value, str):
        layered.put((*path, "name"), value, origin)
        value = layered.get(path)
    if not isinstance(value, dict) or value.get("name") is None:
        return
    name, named_by = str(value["name"]), layered.origin((*path, "name")) or COMMAND_LINE
    if value.get("pieces") is not None and layered.origin((*path, "pieces")) == named_by:
        return  # a saved run's, which was composed before
    if name == STANDARD:
        if path == DATASET:
            layered.put((*path, "name"), None, named_by)
        else:
            layered.put(path, copy.deepcopy(data.standard), "dataset.augment")
        return

    key = ".".join(path)
    pieces = _pieces_of(name, data)
    if isinstance(pieces, str):
        yield f"{key}.name = {name}: {pieces}"
        return
    changed = dict(_changes(layered, path, value, named_by))
    for of, changes in changed.items():
        same = [piece for piece in pieces if piece["name"] == of]
        if not isinstance(changes, dict):
            yield f"{key}.{of} = {changes}: set beside name = {name}; needed either; for more pieces write their list"
        elif not same:
            has = ", ".join(piece["name"] for piece in pieces) or "no piece"
            yield f"{key}.{of}: the stack {name} has no such piece; it has {has}"
        for piece in same:
            piece.update(changes)
    layered.put(path, {"name": name, "pieces": pieces}, f"augment/{name}")


def _pieces_of(name: str, data: _Data) -> list[dict[str, Any]] | str:
    """Return the pieces of a stack for the data set, or what is wrong."""
    known = [STANDARD, *available("augment")]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        return f"no such stack{f', did you mean {near[0]}' if near else ''}; known: {', '.join(known)}"
    file = read_file("augment", name)
    content = file.on.get(data.name, file.content)
    size = "large" if isinstance(data.image_size, int) and data.image_size > SMALL_IMAGE else "small"
    pieces = content.get("pieces", content.get(size))
    if pieces is None:
        return (
            f"it is for {'small' if size == 'large' else 'large'} images, found image_size = {data.image_size}; write "
            f"pieces of your own as a list, or add `{size}` to {path_of('augment', name)}"
        )
    return copy.deepcopy(pieces)


def _changes(layered: Layered, path: Path, value: Mapping[str, Any], named_by: str) -> Iterator[tuple[str, Any]]:
    """Yield what is set beside a name: keys of its pieces, from where it was named or from the command line.

    Keys from layers below belong to the augmentation that the name replaces.
    """
    beside = (named_by, COMMAND_LINE)
    for key, found in value.items():
        if isinstance(found, dict) and key in registered_names("augmentation"):
            own = {k: v for k, v in found.items() if layered.origin((*path, key, k)) in beside}
            if own:
                yield key, own
        elif key != "name" and layered.origin((*path, key)) in beside and key in Augment.model_fields:
            yield key, found
