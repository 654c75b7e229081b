"""The files that can be chosen by name: ours below configs/, and those of a folder of the user's beside them.

    EXPERTAIL_CONFIG_DIR, or --config-dir        DIR/<group>/<name>.yaml; a recipe may lie in DIR itself

A name means the same to everybody who reads a run, a table or a registry. So one that both have is refused.
This file imports next to nothing: the list of choices appears at once.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import configs

VARIABLE = "EXPERTAIL_CONFIG_DIR"
CONFIG_GROUPS = ("method", "dataset", "backbone", "protocol", "pace", "mix", "then", "cluster", "augment", "study")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_TAKEN = ("null", "true", "false", "standard", "unmixed", "generic")
"""Words that mean something else where a name stands."""
_RECIPE = re.compile(r"^(method|of)\s*:", re.MULTILINE)


def configs_folder() -> Path:
    """Return the folder of our YAML groups, in a checkout or an installed wheel."""
    return Path(configs.__file__).parent


def user_folder() -> Path | None:
    """Return the folder of the user's own files; None where none is named.

    Raises:
        ValueError: there is no such folder, or it has a folder whose name is nearly that of a group.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    folder = Path(os.path.expanduser(given))
    if not folder.is_dir():
        raise ValueError(
            f"{VARIABLE} = {given}: no such folder; needed one with recipes, or with method/, dataset/ ..."
        )
    for entry in sorted(folder.iterdir()):
        near = difflib.get_close_matches(entry.name, CONFIG_GROUPS, 1, 0.8) if entry.is_dir() else []
        if near and entry.name not in CONFIG_GROUPS and any(entry.glob("*.yaml")):
            raise ValueError(f"{entry}: no group has this name; did you mean {near[0]}/?")
    return folder


def choices(group: str) -> dict[str, Path]:
    """Return the file of every choice of a group, sorted by name.

    Raises:
        ValueError: a name of the user's is one of ours, or two of theirs are the same.
    """
    ours = _files(configs_folder() / group)
    theirs = _of_user(group)
    for name in theirs:
        if name in ours:
            raise ValueError(
                f"{theirs[name]}: {group}={name} is a name of ours, which means the same in every run and table; give "
                f"the file another name"
            )
    return dict(sorted((ours | theirs).items()))


def _of_user(group: str) -> dict[str, Path]:
    folder = user_folder()
    if folder is None:
        return {}
    found = _files(folder / group)
    for path in _files(folder).values() if group == "method" else ():
        if _RECIPE.search(path.read_text("utf-8-sig", errors="replace")):
            if path.stem in found:
                raise ValueError(f"{path}: there is {found[path.stem]}, too; needed one file of a name")
            found[path.stem] = path
    for name, path in found.items():
        if problem := name_problem(name):
            raise ValueError(f"{path}: {problem}")
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Return the configs of a folder by name; hidden files are locks and traces of editors and systems.

    Folders, pipes and links to nothing are passed over: one of them would end every command.
    """
    return {path.stem: path for path in folder.glob("*.yaml") if not path.name.startswith(".") and path.is_file()}


def passed_over(group: str, choice: str) -> str:
    """Return which file of the user's has the name of a choice and is none, and why; nothing where there is none."""
    folder = user_folder()
    if folder is None:
        return ""
    for path in (folder / group / f"{choice}.yml", folder / f"{choice}.yml"):
        if path.is_file():
            return f"; {path} is passed over, needed the ending .yaml"
    path = folder / f"{choice}.yaml"
    if group != "method" or not path.is_file():
        return ""
    return f"; {path} is passed over, needed a line that begins with method: or of:, as UTF-8"


def name_problem(name: str) -> str | None:
    """Return why a file of this name, without its ending, cannot be chosen; None if it can."""
    if _NAME.fullmatch(name) and name.lower() not in _TAKEN:
        return None
    return f"{name} cannot be chosen by name; needed a letter, then letters, digits, _ and -"


def is_ours(path: Path) -> bool:
    """Say whether a file is one of ours."""
    return configs_folder() in path.parents


def path_of(group: str, choice: str) -> Path:
    """Return the file of a choice.

    Raises:
        ValueError: there is none.
    """
    known = choices(group)
    if choice not in known:
        near = difflib.get_close_matches(choice, known, 1)
        hint = f", did you mean {near[0]}" if near else ""
        raise ValueError(
            f"{group}={choice}: no such {group}{hint}{passed_over(group, choice)}; known: {', '.join(known)}"
        )
    return known[choice]


def with_path(origin: str) -> str:
    """Return the origin of a value, with the path of its file where that is the user's.

    Args:
        origin: `group/choice`, `group/choice on dataset`, or something else, which stays as it is.
    """
    group, _, rest = origin.partition("/")
    choice = rest.partition(" on ")[0]
    path = _of_user(group).get(choice) if group in CONFIG_GROUPS else None
    return origin if path is None else f"{origin}, {path}"


def digests(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return path and SHA-256 of files by name, `group/choice`; ours have paths from configs/ on."""
    found = {}
    for name in names:
        group, _, choice = name.partition("/")
        path = choices(group).get(choice) if group in CONFIG_GROUPS else None
        if path is not None:
            shown = f"configs/{path.relative_to(configs_folder())}" if is_ours(path) else str(path.absolute())
            found[name] = {"file": shown, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return found
