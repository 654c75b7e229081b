"""The parts of a study: recipes, axes, seeds, read from YAML or from the words of a command line.

    expertail study method=ce,ride mix=none,cmo dataset.imbalance_ratio=50,100 seed=0,1,2 dataset=digits_lt
    expertail study study=tour seed=0,1

A value with commas is an axis; `seed` repeats; any other word is for all runs. A word on top of a file replaces the
file's axis of the same key. `study.parallel=2` and its like set keys of the study itself.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from orchestration.config.folders import choices, path_of
from orchestration.config.paths import expand
from orchestration.config.text_keys import is_text
from orchestration.config.words import message
from orchestration.storage.study_file import STUDY_FILE

PARTS = ("method", "mix", "then")
"""Groups that a recipe's name is made of."""
_OWN = "study."  # words with this prefix set keys of the study
_OF = "of"  # names the study that a file changes
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


def _name(value: Any) -> Any:
    """Take a name that YAML has read as a number for the text that it is; refuse a blank one."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("blank; needed text")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _number_or_auto(value: Any) -> Any:
    """Refuse what is neither a positive whole number nor 'auto', in one message for both."""
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("needed a whole number of 1 or more, or auto")


def _truth_or_words(value: Any) -> Any:
    """Refuse what is neither a truth nor a list, in one message for both."""
    if isinstance(value, bool) or (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        return value
    raise ValueError("needed true or false, or a list of words")


def _several(value: Any) -> Any:
    """Return the folders that one word names, `study.adopt=A,B`."""
    return tuple(filter(None, value.strip("[]").split(","))) if isinstance(value, str) else value


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if twice := [str(value) for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} more than once; needed each value once")
    return values


def _keys_once(words: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse words that set one key twice: the later would win in silence."""
    keys = Counter(word.partition("=")[0] for word in words)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} set twice in {' '.join(words)}; needed once")
    return words


def _some(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("found none; needed at least one, e.g. [0, 1, 2]")
    return values


def _worded(recipes: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
    if not all(recipe.words.strip() and (recipe.label is None or recipe.label.strip()) for recipe in recipes):
        raise ValueError("a recipe without words, or with a blank label; needed e.g. method=ride mix=cmo")
    for recipe in recipes:
        _keys_once(tuple(recipe.words.split()))
    return recipes


def _some_pair(exclude: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    if not all(exclude):
        raise ValueError("an exclusion without a pair leaves out every run; needed e.g. {method: ride, mix: cmo}")
    return exclude


_Values = Annotated[tuple[str, ...], AfterValidator(_once)]
_Seed = Annotated[int, Field(ge=0, strict=True)]


class StudyConfig(_Keys):
    """A study, as its file and its words say."""

    name: Annotated[str | None, BeforeValidator(_name)] = None
    """Folder below run.dir. Unset: the name of the file, or else what varies and the data."""
    words: Annotated[tuple[str, ...], AfterValidator(_keys_once)] = ()
    """For all runs."""
    axes: dict[str, _Values] = Field(default_factory=dict)
    """Values by key or group; every combination is a run."""
    recipes: Annotated[tuple[Annotated[Recipe, BeforeValidator(_recipe)], ...], AfterValidator(_worded)] = ()
    """In the place of axes for method, mix and then, or multiplied with other axes."""
    seeds: Annotated[tuple[_Seed, ...], AfterValidator(_some), AfterValidator(_once)] = (0,)
    exclude: Annotated[tuple[dict[str, str], ...], AfterValidator(_some_pair)] = ()
    """A run is left out if its label has all pairs of one of these."""
    baseline: Annotated[str | None, BeforeValidator(_name)] = None
    """Words of the recipe that others are compared with, e.g. `method=ce`, or its label."""
    references: Annotated[bool | tuple[str, ...], BeforeValidator(_truth_or_words)] = False
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
    if not words:
        raise ValueError(
            "a study of nothing; needed study=NAME or study=FILE.yaml (expertail study --list), or keys, e.g. "
            "method=ce,ride seed=0,1,2"
        )
    names = [word.partition("=")[2] for word in words if word.startswith("study=")]
    if len(names) > 1:
        raise ValueError(f"study=: named {len(names)} times ({', '.join(names)}); needed once")
    tree, origin = read_file(names[0]) if names else ({}, "study")
    problems = list[str]()
    _lay_words(tree, [word for word in words if not word.startswith("study=")], problems)
    try:
        study = StudyConfig.model_validate(tree)
    except ValidationError as error:
        typed = {word.partition("=")[0] for word in words}
        for one in error.errors():
            place = _place(one["loc"])
            own = next((key for key in (f"{_OWN}{place}", f"{_OWN}{one['loc'][0]}") if key in typed), place)
            problems.append(f"{own or origin}: {_needed(one)}")
    if problems:
        raise ValueError(message(origin, problems))
    return study


_TOLD = ("parallel", "references")  # keys whose refusals do not say what was found
_NEEDED = {
    "tuple_type": "needed a list", "dict_type": "needed a mapping", "model_type": "needed a mapping",
    "string_type": "needed text", "missing": "not there; needed", "int_type": "needed a whole number",
    "greater_than_equal": "needed 0 or more", "bool_type": "needed true or false", "too_short": "needed at least one",
    "bool_parsing": "needed true or false", "literal_error": "needed {expected}",
}  # fmt: skip
"""Kinds of pydantic's errors in our words."""


def _place(keys: Sequence[str | int]) -> str:
    return ".".join(map(str, keys))


def _needed(error: Any) -> str:
    """Return what is wrong at a key, and what is needed."""
    if error["type"] == "extra_forbidden":
        inner: dict[str, type[BaseModel]] = {"recipes": Recipe, "missing": Missing}
        model = inner.get(str(error["loc"][0]), StudyConfig) if len(error["loc"]) > 1 else StudyConfig
        known = [*model.model_fields, *([_OF] if model is StudyConfig else [])]
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if error["input"] is None and not near:
            hint = "; is it part of a text with a comma? needed quotes around that"
        return f"unknown key{hint}; known: {', '.join(known)}"
    if error["type"] == "value_error":  # of ours
        return str(error["ctx"]["error"]) + (f"; found {error['input']!r}" if error["loc"][0] in _TOLD else "")
    if error["type"] == "missing":
        return "missing; needed " + ("words, e.g. method=ride" if error["loc"][-1] == "words" else "text")
    needed = _NEEDED.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    return f"{needed}; found {error['input']!r}"


class _Loader(yaml.SafeLoader):
    """Reads YAML as `safe_load` does, and refuses a key that is there twice: the second would win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        for key, count in Counter(str(key.value) for key, _ in node.value).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key} is there {count} times", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def _named(name: str) -> Path:
    """Return the file of a study among those of configs/.

    Raises:
        ValueError: there is none; names a file of the working folder that may be meant.
    """
    try:
        return path_of("study", name)
    except ValueError as problem:
        file = Path(f"{name}.yaml")
        raise ValueError(f"{problem}; here is a file: study={file}" if file.is_file() else str(problem)) from None


def read_file(given: str, changed_by: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """Return the content of a study's file, with values as text, and what messages call it.

    Args:
        given: its path, or its name among the studies of configs/.
        changed_by: files that change it, by `of`.

    Raises:
        ValueError: there is no such file, or it is no mapping.
    """
    by_path = _is_path(given)
    path = Path(expand(given)) if by_path else _named(given)
    if path.resolve() in changed_by:
        raise ValueError(f"{path}: of: {given} leads back to itself; needed another study")
    try:
        tree = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except IsADirectoryError:
        hint = "; the command that started a study goes on with it" if (path / STUDY_FILE).exists() else ""
        raise ValueError(f"study={given}: found a folder; needed a YAML file, or the name of one{hint}") from None
    except OSError as problem:
        raise ValueError(f"study={given}: {problem.strerror}; needed a YAML file, or the name of one") from problem
    except UnicodeDecodeError:
        raise ValueError(f"{path}: found bytes that are no text in UTF-8; needed a YAML file") from None
    except yaml.YAMLError as problem:
        raise ValueError(f"{path}: not YAML{_where(problem)}") from None
    if tree is None:
        raise ValueError(f"{path}: empty; needed a mapping with recipes or axes")
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: found {type(tree).__name__}, needed a mapping with recipes or axes")
    tree = {str(key): value for key, value in tree.items()}
    if (other := tree.pop(_OF, None)) is not None:
        beside = path.parent / str(other)  # a path is one from the file's own folder, if there is such a file
        found = str(beside) if _is_path(str(other)) and beside.is_file() else str(other)
        try:
            tree = read_file(found, (*changed_by, path.resolve()))[0] | tree
        except ValueError as problem:
            raise ValueError(f"{path}: {_OF}: {problem}") from problem
    if isinstance(tree.get("axes"), dict):
        tree["axes"] = {
            str(key): [as_value(str(key), value) for value in (values if isinstance(values, list) else [values])]
            for key, values in tree["axes"].items()
        }
    if isinstance(tree.get("exclude"), list):
        tree["exclude"] = [
            {str(key): as_value(str(key), value) for key, value in pairs.items()} if isinstance(pairs, dict) else pairs
            for pairs in tree["exclude"]
        ]
    if tree.get("name") is None:
        tree["name"] = path.stem
    return tree, str(path) if by_path else f"study={given}"


def _is_path(given: str) -> bool:
    return given.endswith((".yaml", ".yml")) or "/" in given


def _where(problem: yaml.YAMLError) -> str:
    """Return the line, the column and what is wrong there."""
    mark = getattr(problem, "problem_mark", None)
    what = getattr(problem, "problem", None) or str(problem).splitlines()[0]
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{place}: {what}" + ("; needed blanks in the place of tabs" if "\\t" in what else "")


def as_value(key: str, value: Any) -> str:
    """Return a value of YAML as the text of a word, written as words of a command line are."""
    text = as_text(value)
    if is_text(key.split(".")):
        return text
    parser = OverridesParser.create()
    try:
        several = parser.parse_override(f"{key}={text}").is_sweep_override()
        found = None if several else _texts(parser.parse_override(f"{key}={text},0"))[0]
    except HydraException:
        found = None
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return in_label(key, found or f"'{quoted}'")


def in_label(key: str, value: str) -> str:
    """Return a value as a label has it: no mixing and no further stage are `none`."""
    return "none" if key in PARTS and value in ("null", "[]", "") else value


def as_text(value: Any) -> str:
    """Return a value of YAML as text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_text(one)}" for key, one in value.items()) + "}"
    return f"[{','.join(map(as_text, value))}]" if isinstance(value, list) else str(value)


def _lay_words(tree: dict[str, Any], words: Sequence[str], problems: list[str]) -> None:
    """Lay words over the content of a file; note what is wrong with them."""
    parser = OverridesParser.create()
    common, axes = tree.get("words"), tree.get("axes")
    common = list(common) if isinstance(common, list) else [] if common is None else common
    axes = dict(axes) if isinstance(axes, dict) else {} if axes is None else axes
    if not isinstance(common, list) or not isinstance(axes, dict):
        return  # refused as it is
    common = [plain_word(word) if isinstance(word, str) else word for word in common]
    for word in map(plain_word, words):
        key, found, text = word.partition("=")
        if not found or not key:
            problems.append(f"{word}: not of the form key=value; needed e.g. method=ce,ride or seed=0,1,2")
        elif key == "seeds":
            problems.append(f"{word}: unknown key; did you mean seed={text}")
        elif key.startswith(_OWN):
            _lay_own(tree, key.removeprefix(_OWN), text, problems)
        elif key == "seed":
            seeds = _values(parser, word) or [text]
            if all(seed.isdecimal() for seed in seeds):
                tree["seeds"] = [int(seed) for seed in seeds]
            else:
                problems.append(f"{word}: needed whole numbers of 0 or more, e.g. seed=0,1,2 or seed=range(0,3)")
        else:
            common = [other for other in common if str(other).partition("=")[0] != key]
            values = None if is_text(key.split(".")) else _values(parser, word)
            replaced = axes.pop(key, None)
            if values is None:
                common.append(word)
            else:
                axes[key] = values
            if replaced is not None:
                _shorten_exclusions(tree, key, values or [text])
    tree |= {"words": common, "axes": axes}


def plain_word(word: str) -> str:
    """Return a word as composing takes it: no mixing and no further stage are `none` in a study's labels."""
    return word.replace("none", "null") if word in ("mix=none", "then=none") else word


def _lay_own(tree: dict[str, Any], key: str, text: str, problems: list[str]) -> None:
    """Set a key of the study itself."""
    if key in _BY_FILE_ALONE:
        problems.append(
            f"{_OWN}{key}={text}: set in a study's file alone; needed plain words, e.g. method=ce,ride seed=0,1"
        )
    elif key.startswith("report."):
        tree["report"] = {**(tree.get("report") or {}), key.removeprefix("report."): text}
    elif key in ("name", "baseline"):
        tree[key] = None if text == "null" else text
    else:
        tree[key] = int(text) if text.isdecimal() else {"null": None, "true": True, "false": False}.get(text, text)


def _shorten_exclusions(tree: dict[str, Any], key: str, values: Sequence[str]) -> None:
    """Leave exclusions out that are about values of an axis that a word has replaced."""
    if isinstance(tree.get("exclude"), list):
        tree["exclude"] = [
            pairs for pairs in tree["exclude"]
            if not isinstance(pairs, dict) or pairs.get(key) in (None, *(in_label(key, value) for value in values))
        ]  # fmt: skip


def _values(parser: OverridesParser, word: str) -> list[str] | None:
    """Return the values of a word that has several, each as the text of a word; None if it has one."""
    try:
        override = parser.parse_override(word)
        return (
            [in_label(override.key_or_group, text) for text in _texts(override)]
            if override.is_sweep_override()
            else None
        )
    except HydraException:
        return None  # a path with spaces, say; composing says what is wrong with others


def _texts(override: Override) -> list[str]:
    return [
        {"True": "true", "False": "false"}.get(str(value), str(value)) for value in override.sweep_string_iterator()
    ]


def default_name(study: StudyConfig, recipe: str, dataset: str) -> str:
    """Return the name of a study without one: what varies, what does not, and the data; the same when values are added.

    Args:
        study: without a name.
        recipe: name of its first run's recipe.
        dataset: name of its data.
    """
    varied = [short_key(key) for key in study.axes] or (["recipe"] if study.recipes else [])
    parts = dict(word.partition("=")[::2] for word in study.words)
    fixed = [parts[key].strip("[]").replace(",", "+") for key in PARTS if parts.get(key, "null") not in ("null", "[]")]
    whole = study.recipes or any(key in study.axes for key in PARTS)  # then the recipe's name is that of one run alone
    data = "" if "dataset" in study.axes else dataset
    words = ["study", "+".join(varied), "+".join(fixed) if whole else recipe, data]
    return re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, words)))


def short_key(key: str) -> str:
    """Return the last word of a key: ratio of dataset.imbalance_ratio."""
    return key.rpartition(".")[2].rpartition("_")[2]


def studies_text() -> str:
    """Return a line per study that can be named, with the first line of its file."""
    found = {name: path.read_text().partition("\n")[0].lstrip("# ") for name, path in choices("study").items()}
    return "\n".join(f"study={name:<20} {text}" for name, text in found.items())
