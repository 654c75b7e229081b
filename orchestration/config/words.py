"""The words of a command line: choices of files under configs/, and values for single keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from orchestration.config.folders import choices, passed_over
from orchestration.config.text_keys import is_text

RECIPE_GROUPS = ("method", "dataset", "backbone", "protocol", "pace", "mix", "then", "cluster")
"""Folders of configs/. Of `then` several may be chosen, of the others one."""
NO_MIX = "null"
"""The choice of `mix` that takes off the mixing of a recipe."""
UNMIXED = "unmixed"
"""The part in the name of a recipe whose mixing was taken off."""


class Words(NamedTuple):
    """A command line, read."""

    choices: dict[str, str]
    """By group, the file that is chosen; without `then`."""
    then: tuple[str, ...]
    values: list[Override]
    """In the order given."""


def available(group: str) -> list[str]:
    """Return the choices of a group, sorted; those of the user's folder, too."""
    return list(choices(group))


def parse(words: list[str]) -> Words:
    """Split words into choices and values.

    Args:
        words: `group=choice`, `then=[part,...]` and `a.b=value`. No part is `then=null`. `mix=null` is kept
            as `NO_MIX`, because a recipe may have a mixing of its own.

    Raises:
        ValueError: every word that is neither, one line each.
    """
    parser = OverridesParser.create()
    read = Words({}, (), [])
    problems: list[str] = []
    for word in words:
        try:
            override = _parse_word(parser, word)
        except ValueError as problem:
            problems.append(f"{word}: {problem}")
            continue
        key = override.key_or_group
        if key == "schedule":
            problems.append(_no_schedule(word, str(override.value())))
        elif key == "then":
            chosen = override.value()
            parts = tuple(map(str, chosen if isinstance(chosen, list) else [chosen] if chosen else ()))
            if parts and read.then:
                together = ",".join(dict.fromkeys((*read.then, *parts)))
                problems.append(f"{word}: then= is set twice; needed once; both side by side are 'then=[{together}]'")
            read = read._replace(then=parts)
        elif key == "mix":
            problems += _set_mix(read.choices, word, override.value())
        elif key in RECIPE_GROUPS:
            read.choices[key] = str(override.value())
        else:
            read.values.append(override)
    problems += [problem for group, choice in read.choices.items() for problem in _unknown(group, choice)]
    problems += [problem for part in dict.fromkeys(read.then) for problem in _unknown("then", part)]
    twice = [part for part in dict.fromkeys(read.then) if read.then.count(part) > 1]
    problems += [f"then={part}: named {read.then.count(part)} times; needed each part once" for part in twice]
    if problems:
        raise ValueError(message(title(words), sorted(problems)))
    return read


def title(words: list[str]) -> str:
    """Return the first words of a message about a command line."""
    return " ".join(words) if words else "the default config"


def message(title: str, lines: list[str]) -> str:
    """Return one message for several problems; lines that begin with blanks belong to the one before."""
    count = sum(not line.startswith(" ") for line in lines)
    return f"{title}: {count} problem{'s' if count > 1 else ''}\n" + "\n".join(f"  {line}" for line in lines)


def _parse_word(parser: OverridesParser, word: str) -> Override:
    """Parse one override.

    Raises:
        ValueError: what is needed.
    """
    if "${" in word:  # a value from the environment would end up in the run folder and on the tracking server
        raise ValueError("needed a plain value; ${...} is not filled in here, let the shell do it")
    try:
        override = _parse_literally(parser, word)
    except HydraException:
        raise ValueError("not of the form key=value; needed e.g. dataset.imbalance_ratio=100") from None
    if override.type is OverrideType.CHANGE and is_text(override.key_or_group.split(".")):
        typed = word.partition("=")[2]
        if not typed:  # of a shell's variable that is not set; the folder of run.dir= would be the current one
            raise ValueError("needed something behind the =; null stands for nothing")
        return override if _is_typed(override, typed) else _quote(parser, word)
    if override.type is OverrideType.CHANGE and not override.is_sweep_override():
        return override
    if word.startswith("then=") and override.is_sweep_override():
        raise ValueError(
            f"several parts side by side are written in brackets, 'then=[{word.removeprefix('then=')}]'; without them, "
            f"`expertail sweep` trains a run for each"
        )
    raise ValueError("needed key=value with one value and no +, ++ or ~")


def _is_typed(override: Override, typed: str) -> bool:
    """Say whether a name or path was read as it is typed, or quoted by whoever typed it.

    2e57342, 1.10, true and a,b are names, and no numbers, truths or lists; a blank at the end is a part of one.
    """
    if override.is_sweep_override():
        return False
    found = override.value()
    quoted = isinstance(found, str) and (typed[0] in "'\"" or "\\" in typed)
    return found is None or found == typed or quoted


def _parse_literally(parser: OverridesParser, word: str) -> Override:
    """Parse one override. A value that Hydra's grammar cannot read (a path with spaces, say) is taken literally."""
    try:
        return parser.parse_override(word)
    except HydraException:
        if "=" not in word:
            raise
        return _quote(parser, word)


def _quote(parser: OverridesParser, word: str) -> Override:
    """Parse one override whose value is the text that is there."""
    key, _, text = word.partition("=")
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return parser.parse_override(f"{key}='{quoted}'")


def _set_mix(choices: dict[str, str], word: str, value: Any) -> Iterator[str]:
    """Choose the mixing of a word, or none; yield a problem where that makes two."""
    chosen = list(map(str, value if isinstance(value, list) else [] if value is None else [value]))
    before = choices.get("mix", NO_MIX)
    together = list(dict.fromkeys([before, *chosen] if before != NO_MIX and chosen else chosen))
    if len(together) > 1:
        yield f"{word}: {len(together)} mixings, {' and '.join(together)}; needed one, as images are mixed once"
    choices["mix"] = together[0] if together else NO_MIX


def _unknown(group: str, choice: str) -> Iterator[str]:
    known = available(group)
    if choice in known or (group, choice) == ("mix", NO_MIX):
        return
    near = difflib.get_close_matches(choice, known, 1)
    hint = f", did you mean {group}={near[0]}" if near else ""
    elsewhere = [other for other in ("method", "mix", "then") if other != group and choice in available(other)]
    if elsewhere:
        hint = f", but there is {' and '.join(f'{other}={choice}' for other in elsewhere)}"
    yield f"{group}={choice}: no such {group}{hint}{passed_over(group, choice)}; known: {', '.join(known)}"


def _no_schedule(word: str, name: str) -> str:
    """Return what to write for a schedule of earlier versions, `<method>_<dataset>`."""
    methods = sorted(available("method"), key=len, reverse=True)
    method = next((method for method in methods if name.startswith(f"{method}_")), None)
    dataset = name.removeprefix(f"{method}_")
    instead = (
        f"method={method} dataset={dataset}" if method and dataset in available("dataset") else "method=, dataset="
    )
    other = f"pace={dataset}" if dataset in available("pace") else "pace="
    return (
        f"{word}: there are no schedules any more; needed {instead}, from which pace and protocol follow; for other "
        f"data {other}, and protocol= (expertail train --list)"
    )
