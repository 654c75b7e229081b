"""`expertail ls` and `train --list`: what can be chosen, methods and parts by the survey's taxonomy, a line each.

The line is the first comment line of the file. Imports next to nothing, so that the list appears at once.
"""

from __future__ import annotations

import textwrap

from orchestration.config.folders import choices, is_ours, path_of

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
"""The field's own taxonomy: Zhang et al. 2023, "Deep Long-Tailed Learning: A Survey", arXiv:2110.04596. A recipe or a
part names its family in a comment line `# family: ...`, which is no key and so no part of a run's identity."""

_NO_FAMILY = "no family named"
_LABEL = "# family:"
_WIDTH = 120
_COLUMN = 27
_PARTS = ("method", "mix", "then")
_SETTINGS = {
    "dataset": "the images, and where they lie: dataset.root=",
    "protocol": "optimiser and learning rates as published; follows from method and data set",
    "pace": "epochs, batch sizes, backbone; follows from the data set",
    "backbone": "the network; follows from the data set",
    "cluster": "where it runs",
    "study": "many runs that are compared: expertail study study=",
}


def choices_text() -> str:
    """Return the choices of every group: methods and parts by family, a line each, then the settings."""
    lines = [
        "A recipe is a method, with parts if you like: mix= changes what its network learns from, then= adds stages."
    ]
    for family in (*FAMILIES, _NO_FAMILY):
        members = [(group, name) for group in _PARTS for name in _names(group) if family_of(name, group) == family]
        lines += ["", family] if members else []
        for group, name in members:
            lines += _row(f"  {group}={name}", _about(group, name))
    for group, about in _SETTINGS.items():
        lines += ["", f"{group}=   {about}"]
        if group in ("dataset", "protocol", "pace", "study"):
            for name in _names(group):
                lines += _row(f"  {group}={name}", _about(group, name))
        else:
            lines += textwrap.wrap(" | ".join(_names(group)), _WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += [
        "",
        "dataset.augment.name=   random changes of the images; of one stage: method.stages.<stage>.augment.name=",
    ]
    lines += _row("  standard", "the data set's own, as its keys say")
    for name in _names("augment"):
        lines += _row(f"  {name}", _about("augment", name))
    return "\n".join(lines)


def family_of(name: str, group: str = "method") -> str:
    """Return the family that a recipe or part names, or "no family named" where it names none of FAMILIES."""
    named = (line.removeprefix(_LABEL).strip() for line in _lines(group, name) if line.startswith(_LABEL))
    return next((family for family in named if family in FAMILIES), _NO_FAMILY)


def _about(group: str, name: str) -> str:
    """Return the first comment line of a file, and where it lies if it is the user's."""
    first, path = _lines(group, name)[0], path_of(group, name)
    about = first.removeprefix("#").strip() if first.startswith("#") else ""
    return about if is_ours(path) else f"{about} ({path})".strip()


def _lines(group: str, name: str) -> list[str]:
    return path_of(group, name).read_text("utf-8", errors="replace").splitlines() or [""]


def _names(group: str) -> list[str]:
    return list(choices(group))


def _row(label: str, about: str) -> list[str]:
    """Return a line; a long label stands on its own."""
    if len(label) < _COLUMN:
        return [f"{label:{_COLUMN}} {about}".rstrip()]
    return [label, f"{'':{_COLUMN}} {about}"]
