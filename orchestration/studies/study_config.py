"""The parts of a study: recipes, axes, seeds, read from YAML or from the words of a command line.

    expertail study method=ce,ride mix=none,cmo dataset.imbalance_ratio=50,100 seed=0,1,2 dataset=digits_lt
    expertail study study=tour seed=0,1

A value with commas is an axis; `seed` repeats; any other word is for all runs. A word on top of a file replaces the
file's axis of the same key. `study.parallel=2` and its like set keys of the study itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from orchestration.config.folders import choices, path_of
from orchestration.config.paths import expand
from orchestration.config.text_keys import is_text
from orchestration.config.words import message

PARTS = ("method", "mix", "then")
"""Groups that a recipe's name is made of."""
_OWN = "study."  # words with this prefix set keys of the study
_BY_FILE_ALONE = ("words", "axes", "recipes", "seeds", "exclude", "missing", "of")


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Recipe(_Keys):
    """One recipe of a study: words that belong together."""

    words: str
    """As on a command line, e.g. `method=ride method.num_experts=5`."""
    label: str | None = None
    """Its name in reports. Unset: by its words."""


class Missing(_Keys):
    """A row that reports list, though nothing trains it."""

    label: str
    why: str


def _recipe(value: Any) -> Any:
    return {"words": value} if isinstance(value, str) else value


def _number_or_auto(value: Any) -> Any:
    """Refuse what is neither a positive whole number nor 'auto', in one message for both."""
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("needed a whole number of 1 or more, or auto")


def _several(value: Any) -> Any:
    """Return the folders that one word names, `study.adopt=A,B`."""
    return tuple(filter(None, value.strip("[]").split(","))) if isinstance(value, str) else value


class StudyConfig(_Keys):
    """A study, as its file and its words say."""

    name: str | None = None
    """Folder below run.dir. Unset: the name of the file, or else what varies and the data."""
    words: tuple[str, ...] = ()
    """For all runs."""
    axes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Values by key or group; every combination is a run."""
    recipes: tuple[Annotated[Recipe, BeforeValidator(_recipe)], ...] = ()
    """In the place of axes for method, mix and then, or multiplied with other axes."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    exclude: tuple[dict[str, str], ...] = ()
    """A run is left out if its label has all pairs of one of these."""
    baseline: str | None = None
    """Words of the recipe that others are compared with, e.g. `method=ce`."""
    references: bool | tuple[str, ...] = False
    """Add the runs on the balanced variant of the data that relative accuracy needs. Words, where `dataset.balanced`
    cannot make the variant: a list of as many images of every class."""
    missing: tuple[Missing, ...] = ()
    report: dict[str, Any] = Field(default_factory=dict)
    """For `expertail report`."""
    adopt: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()
    """Folders of finished runs that were trained elsewhere; those that are runs of the study are taken over."""
    parallel: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)] = "auto"
    """The most runs at once. auto: as many as the cluster has places for."""
    retry: Literal["failed"] | None = None
    """'failed' trains failed runs again; by default they stay failed."""


def read_study(words: Sequence[str]) -> StudyConfig:
    """Read a study from a file that the words name, or from the words alone.

    Raises:
        ValueError: everything that is wrong with file and words, one line each.
    """
    names = [word.partition("=")[2] for word in words if word.startswith("study=")]
    if len(names) > 1:
        raise ValueError(f"study=: named {len(names)} times ({', '.join(names)}); needed once")
    tree, origin = _from_file(names[0]) if names else ({}, "study")
    problems = list[str]()
    _lay_words(tree, [word for word in words if not word.startswith("study=")], problems)
    try:
        study = StudyConfig.model_validate(tree)
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, one['loc'])) or origin}: {_needed(one)}" for one in error.errors()]
    if problems:
        raise ValueError(message(origin, problems))
    return study


def _needed(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key; known: {', '.join(StudyConfig.model_fields)}"
    return f"{error['msg']}; found {error['input']!r}"


def _from_file(given: str) -> tuple[dict[str, Any], str]:
    """Return the content of a study's file, with values as text, and what messages call it.

    Raises:
        ValueError: there is no such file, or it is no mapping.
    """
    by_path = given.endswith((".yaml", ".yml")) or "/" in given
    path = Path(expand(given)) if by_path else path_of("study", given)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as problem:
        raise ValueError(f"study={given}: {problem.strerror}; needed a YAML file, or the name of one") from problem
    except yaml.YAMLError as problem:
        raise ValueError(f"{path}: not YAML ({str(problem).splitlines()[0]})") from problem
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: found {type(tree).__name__}, needed a mapping with recipes or axes")
    if (other := tree.pop("of", None)) is not None:
        tree = _from_file(str(other))[0] | tree
    if isinstance(tree.get("axes"), dict):
        tree["axes"] = {
            str(key): [as_text(value) for value in (values if isinstance(values, list) else [values])]
            for key, values in tree["axes"].items()
        }
    if isinstance(tree.get("exclude"), list):
        tree["exclude"] = [
            {str(key): as_text(value) for key, value in pairs.items()} if isinstance(pairs, dict) else pairs
            for pairs in tree["exclude"]
        ]
    tree.setdefault("name", path.stem)
    return tree, str(path) if by_path else f"study={given}"


def as_text(value: Any) -> str:
    """Return a value of YAML as the text of a word."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(as_text, value))}]" if isinstance(value, list) else str(value)


def _lay_words(tree: dict[str, Any], words: Sequence[str], problems: list[str]) -> None:
    """Lay words over the content of a file; note what is wrong with them."""
    parser = OverridesParser.create()
    common, axes = list(tree.get("words") or ()), dict(tree.get("axes") or {})
    for word in words:
        key, found, text = word.partition("=")
        if not found or not key:
            problems.append(f"{word}: not of the form key=value; needed e.g. method=ce,ride or seed=0,1,2")
        elif key == "seeds":
            problems.append(f"{word}: unknown key; did you mean seed={text}")
        elif key.startswith(_OWN):
            own = key.removeprefix(_OWN)
            if own in _BY_FILE_ALONE:
                problems.append(f"{word}: set in a study's file alone; needed plain words, e.g. method=ce,ride")
            else:
                tree[own] = int(text) if text.isdecimal() else None if text == "null" else _truth(text)
        elif key == "seed":
            tree["seeds"] = [int(value) if value.isdecimal() else value for value in _values(parser, word) or [text]]
        else:
            axes.pop(key, None)
            common = [other for other in common if other.partition("=")[0] != key]
            values = None if is_text(key.split(".")) else _values(parser, word)
            if values is None:
                common.append(word)
            else:
                axes[key] = values
    tree |= {"words": common, "axes": axes}


def _truth(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


def _values(parser: OverridesParser, word: str) -> list[str] | None:
    """Return the different values of a word that has several, each as the text of a word; None if it has one."""
    try:
        override = parser.parse_override(word)
    except HydraException:
        return None  # a path with spaces, say
    if not override.is_sweep_override():
        return None
    return list(dict.fromkeys(str(value) for value in override.sweep_string_iterator()))


def default_name(study: StudyConfig, recipe: str, dataset: str) -> str:
    """Return the name of a study without one: what varies, what does not, and the data; the same when values are added.

    Args:
        study: without a name.
        recipe: name of its first run's recipe.
        dataset: name of its data.
    """
    varied = [short_key(key) for key in study.axes if key != "dataset"] or (["recipe"] if study.recipes else [])
    parts = dict(word.partition("=")[::2] for word in study.words)
    fixed = [parts[key].strip("[]").replace(",", "+") for key in PARTS if parts.get(key, "null") not in ("null", "[]")]
    whole = study.recipes or any(key in study.axes for key in PARTS)  # then the recipe's name is that of one run alone
    words = ["study", "+".join(varied), "+".join(fixed) if whole else recipe, dataset]
    return re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, words)))


def short_key(key: str) -> str:
    """Return the last word of a key: ratio of dataset.imbalance_ratio."""
    return key.rpartition(".")[2].rpartition("_")[2]


def studies_text() -> str:
    """Return a line per study that can be named, with the first line of its file."""
    found = {name: path.read_text().partition("\n")[0].lstrip("# ") for name, path in choices("study").items()}
    return "\n".join(f"study={name:<20} {text}" for name, text in found.items())
