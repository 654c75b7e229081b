"""`expertail train --list`: what can be chosen for every group, with methods by family.

Imports next to nothing, so that the list appears at once.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import configs

FAMILIES = (
    "baseline",
    "class re-balancing / re-sampling",
    "class re-balancing / cost-sensitive",
    "class re-balancing / logit adjustment",
    "information augmentation / transfer",
    "information augmentation / augmentation",
    "module improvement / representation",
    "module improvement / classifier",
    "module improvement / decoupled",
    "module improvement / ensemble",
)
"""The field's own taxonomy: Zhang et al. 2023, "Deep Long-Tailed Learning: A Survey", arXiv:2110.04596. A recipe names
its family in a comment line `# family: ...`, which is no key and so no part of a run's identity."""

_NO_FAMILY = "no family named"
_LABEL = "# family:"
_WIDTH = 120


def choices_text() -> str:
    """Return the choices of every group: methods by family, and the data sets that each method has a schedule for."""
    methods = _names("method")
    lines = ["method="]
    for family in (*FAMILIES, _NO_FAMILY):
        if members := [name for name in methods if family_of(name) == family]:
            lines += _row(f"  {family:40}", members)
    for group in ("dataset", "backbone", "cluster"):
        lines += _row(f"{group}=", _names(group))
    lines.append("schedule=<method>_<dataset>, by default the one of method= and dataset=:")

    # Methods and data sets have underscores in their names, so a schedule's name cannot simply be split.
    schedules = set(_names("schedule"))
    endings = [ending for name in _names("dataset") for ending in (name, f"{name}_demo")]
    for method in methods:
        lines += _row(f"  {method + '_':14}", [ending for ending in endings if f"{method}_{ending}" in schedules])
    return "\n".join(lines)


def family_of(method: str) -> str:
    """Return the family that a recipe names, or "no family named" where it names none of FAMILIES."""
    recipe = (_folder() / "method" / f"{method}.yaml").read_text("utf-8")
    named = (line.removeprefix(_LABEL).strip() for line in recipe.splitlines() if line.startswith(_LABEL))
    return next((family for family in named if family in FAMILIES), _NO_FAMILY)


def _names(group: str) -> list[str]:
    return sorted(path.stem for path in (_folder() / group).glob("*.yaml"))


def _folder() -> Path:
    return Path(configs.__file__).parent


def _row(label: str, names: list[str]) -> list[str]:
    indent = " " * len(label)
    return textwrap.wrap(" | ".join(names), _WIDTH, initial_indent=label, subsequent_indent=indent) or [label.rstrip()]
