"""`expertail cp`: a copy of one of our files, or of yours, to change.

expertail cp ride my.yaml                   then: expertail train --config-dir . method=my
expertail cp dataset=cifar10_lt mine/dataset/birds.yaml
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from orchestration.config.folders import CONFIG_GROUPS, VARIABLE, configs_folder, name_problem, path_of
from orchestration.config.paths import expand


def copy_recipe(source: str, target: str) -> str:
    """Copy a file, and return a line that says how to use it.

    Args:
        source: a method, or `group=choice`.
        target: the file to write; `<name>.yaml`, in a folder that exists.

    Raises:
        ValueError: there is no such choice, the target exists, or its name cannot be that of a choice.
    """
    group, _, choice = source.rpartition("=")
    group = group or "method"
    if group not in CONFIG_GROUPS:
        raise ValueError(f"{source}: no group is called {group}; known: {', '.join(CONFIG_GROUPS)}")
    text, path = path_of(group, choice).read_text("utf-8-sig"), Path(expand(target))
    name = path.stem
    if path.suffix != ".yaml":
        raise ValueError(f"{target}: needed a name that ends in .yaml, e.g. my_{choice}.yaml")
    if problem := name_problem(name):
        raise ValueError(f"{target}: {problem}")
    if (configs_folder() / group / path.name).exists():
        raise ValueError(f"{target}: {group}={name} is a name of ours; give the file another name")
    if path.exists():
        raise ValueError(f"{target}: exists; give the copy another name, or remove the file")
    if not path.parent.is_dir():
        raise ValueError(f"{target}: {path.parent} is no folder; needed one that exists")
    if group == "dataset":  # whose runs, tables and models are called after it
        text = re.sub(r"^(\s*name:\s*)" + re.escape(choice) + r"\s*$", rf"\g<1>{name}", text, flags=re.MULTILINE)
    path.write_text(text, "utf-8")
    return f"{target}: {group}={name}, a copy of {source}; {_use(path, group, name)}"


def _use(path: Path, group: str, name: str) -> str:
    """Say how the new file is found."""
    below = path.parent.name == group
    if not below and group != "method":
        return f"to use it, put it into a folder {group}/ of your {VARIABLE}"
    folder = path.parent.parent if below else path.parent
    word = f"then={name}" if group == "then" else f"{group}={name}"
    return f"to use it: expertail train --config-dir {shlex.quote(str(folder))} {word}"
