"""The YAML files of the groups as layers, and the shorthands that they may use.

A file is a part of the config: `method:`, `dataset:`, ... at the top. It may also have

    stage: {...}                 changes to every stage that learns the trunk
    second: {...}                changes to every later stage with steps, which learns heads or gates only
    protocol: name               the protocol to use, if the command line names none
    backbone: name               the backbone, in the same way; or {of: name, ...} to change some of its keys, too
    on: {name: {...}, ...}       the same again, for one data set, protocol, or pace that is not called as a data set
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestration.config.folders import is_ours, path_of
from orchestration.config.origins import Layered

STAGES = ("method", "stages")
_SHORTHANDS = ("stage", "second", "protocol", "on", "of")


@dataclass(frozen=True)
class File:
    """One YAML file.

    Attributes:
        name: group and choice, as `show` names it: method/ride.
        content: without its `on`.
        on: by data set, protocol or pace.
    """

    name: str
    content: dict[str, Any]
    on: dict[str, dict[str, Any]]

    @property
    def choice(self) -> str:
        """The name without the group."""
        return self.name.rpartition("/")[2]

    def blocks(self, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the blocks of `on` for some names, each with its own name."""
        yield from ((f"{self.name} on {name}", self.on[name]) for name in names if name in self.on)


def read_file(group: str, choice: str) -> File:
    """Read the file of a choice, <group>/<choice>.yaml, ours or the user's.

    Raises:
        ValueError: there is none, it is not YAML, or not made as such a file is; names it.
    """
    path = path_of(group, choice)
    content = copy.deepcopy(_mapping(path, path.stat().st_mtime_ns))
    # YAML 1.1 reads the bare key `on` as true.
    on = content.pop("on", None) or content.pop(True, None) or {}
    if not is_ours(path):
        _check_made(path, group, choice, content, on)
    return File(f"{group}/{choice}", content, {str(name): block or {} for name, block in on.items()})


def _check_made(path: Path, group: str, choice: str, content: Mapping[str, Any], on: Any) -> None:
    """Refuse a file of the user's whose shorthands are none.

    Raises:
        ValueError: names file and key.
    """
    of = content.get("of")
    if group == "dataset" and content.get("name") != choice:
        raise ValueError(f"{path}: name = {content.get('name')}; needed {choice}, as the file is called")
    if of is not None and not (isinstance(of, Mapping) and isinstance(of.get("method"), str)):
        raise ValueError(f"{path}: of: found {of}; needed a mapping with method, e.g. {{method: ride, then: [crt]}}")
    if not isinstance(on, Mapping) or any(not isinstance(block, Mapping | None) for block in on.values()):
        raise ValueError(
            f"{path}: on: needed mappings by data set, protocol or pace, e.g. {{cifar10_lt: {{stage: {{...}}}}}}"
        )
    for key in ("stage", "second"):
        if not isinstance(content.get(key, {}), Mapping):
            raise ValueError(f"{path}: {key}: found {content[key]}; needed a mapping")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that is no choice of a group.

    Raises:
        ValueError: it is not YAML, or no mapping.
    """
    return copy.deepcopy(_mapping(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=512)
def _mapping(path: Path, changed: int) -> dict[Any, Any]:
    """Parse a file once for each time it is `changed`."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, needed a mapping")
    return content


def lay_block(layered: Layered, content: Mapping[str, Any], origin: str) -> None:
    """Lay a file's content, or a block of its `on`."""
    layered.lay(_plain(content), origin)
    for key, learns_trunk in (("stage", True), ("second", False)):
        if key in content:
            for name in stages_that(layered, learns_trunk=learns_trunk):
                layered.lay(content[key], origin, (*STAGES, name))


def lay_part(layered: Layered, content: Mapping[str, Any], origin: str, stage: str) -> None:
    """Lay the content of a `then` part, or a block of its `on`: its `stage` is one stage of that name."""
    layered.lay(_plain(content), origin)
    layered.lay(content.get("stage", {}), origin, (*STAGES, stage))


def stages_that(layered: Layered, *, learns_trunk: bool) -> list[str]:
    """Return the names of the stages that learn the trunk, or of the others with steps."""
    return [
        name
        for name, stage in (layered.get(STAGES) or {}).items()
        if (_learns_trunk(stage) if learns_trunk else not _learns_trunk(stage)) and stage.get("epochs") != 0
    ]


def _learns_trunk(stage: Mapping[str, Any]) -> bool:
    return "trunk" not in (stage.get("freeze") or ())


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the config itself."""
    plain = {key: value for key, value in content.items() if key not in _SHORTHANDS}
    backbone = plain.get("backbone")
    if isinstance(backbone, str):
        del plain["backbone"]
    elif isinstance(backbone, Mapping):
        plain["backbone"] = {key: value for key, value in backbone.items() if key != "of"}
    return plain


def named_in(content: Mapping[str, Any], key: str) -> str | None:
    """Return the protocol or backbone that a file or block names; None if it names none."""
    value = content.get(key)
    if isinstance(value, Mapping):
        value = value.get("of")
    return value if isinstance(value, str) else None
