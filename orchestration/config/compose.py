"""From the words of a command line to a valid config.

words -> group choices and `a.b=value` overrides        `parse`
      -> one tree, composed by Hydra from configs/      `_compose`
      -> a frozen RunConfig, all problems at once       `check`
      -> paths made absolute                            `_with_absolute_paths`
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from experts.registry import piece, registered_names
from orchestration.config.paths import expand
from orchestration.config.recipe import PieceOf
from orchestration.config.run_config import RunConfig

S = TypeVar("S", bound=BaseModel)
GROUPS = ("method", "dataset", "backbone", "schedule", "cluster")


def configs_folder() -> Path:
    """Return the folder of the YAML groups, in a checkout or an installed wheel."""
    return Path(str(files("configs")))


def load_config(words: list[str]) -> RunConfig:
    """Compose and validate a run's config.

    Args:
        words: `group=choice` and `a.b=value`.

    Raises:
        ValueError: everything that is wrong, one line each.
    """
    choices, values = parse(words)
    tree = _compose(choices)
    # Laid on by us: Hydra would refuse keys that the YAML leaves out, which the schema knows and checks later.
    for override in values:
        OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
    return _with_absolute_paths(check(OmegaConf.to_container(tree), _title(words)))  # type: ignore[arg-type]


def check(tree: dict[str, Any], title: str) -> RunConfig:
    """Validate a nested mapping against the schema.

    Raises:
        ValueError: the title, then one line per problem: key, what was found, what is needed.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = sorted({_line(problem, tree) for problem in error.errors()})
    raise ValueError(_message(title, lines))


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make paths absolute: workers and later commands may run in other folders."""
    method = config.method
    stages = {
        name: stage.model_copy(
            update={
                "start_from": stage.start_from and _with_absolute(stage.start_from, "run"),
                "teachers": {key: _with_absolute(teacher, "run") for key, teacher in stage.teachers.items()},
            }
        )
        for name, stage in method.stages.items()
    }
    method = _with_absolute(method.model_copy(update={"stages": stages}), "backbone_weights")
    return config.model_copy(update={"method": method, "dataset": _with_absolute(config.dataset, "root")})


def _with_absolute(settings: S, key: str) -> S:
    path = getattr(settings, key)
    return settings if path is None else settings.model_copy(update={key: os.path.abspath(expand(path))})


def to_yaml(config: RunConfig) -> str:
    """Return the resolved config as plain YAML; `from_yaml` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def from_yaml(path: Path) -> RunConfig:
    """Read a run's config.yaml.

    Raises:
        ValueError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a run's config ({_first_line(error)})") from error
    except Exception as error:  # the YAML parser's own errors have no common base outside its package
        raise ValueError(f"{path}: not YAML ({_first_line(error)})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: found {type(tree).__name__}, needed a mapping")
    return check(tree, str(path))  # type: ignore[arg-type]


def available(group: str) -> list[str]:
    """Return the choices of a group, sorted."""
    return sorted(path.stem for path in (configs_folder() / group).glob("*.yaml"))


def parse(words: list[str]) -> tuple[dict[str, str], list[Override]]:
    """Split words into group choices and value overrides.

    Raises:
        ValueError: every word that is neither, one line each.
    """
    parser = OverridesParser.create()
    choices: dict[str, str] = {}
    values: list[Override] = []
    problems = []
    for word in words:
        if "${" in word:  # a value from the environment would end up in the run folder and on the tracking server
            problems.append(f"{word}: needed a plain value; ${{...}} is not filled in here, let the shell do it")
            continue
        try:
            override = _parse_word(parser, word)
        except HydraException:
            problems.append(f"{word}: not of the form key=value; needed e.g. dataset.imbalance_ratio=100")
            continue
        if override.type is not OverrideType.CHANGE or override.is_sweep_override():
            problems.append(f"{word}: needed key=value with one value and no +, ++ or ~")
        elif override.key_or_group in GROUPS:
            choices[override.key_or_group] = str(override.value())
        else:
            values.append(override)
    for group, choice in choices.items():
        if choice not in available(group):
            near = difflib.get_close_matches(choice, available(group), 1)
            hint = f", did you mean {group}={near[0]}" if near else ""
            problems.append(f"{group}={choice}: no such {group}{hint}; known: {', '.join(available(group))}")
    if problems:
        raise ValueError(_message(_title(words), sorted(problems)))
    return choices, values


def _parse_word(parser: OverridesParser, word: str) -> Override:
    """Parse one override. A value that Hydra's grammar cannot read (a path with spaces, say) is taken literally."""
    try:
        return parser.parse_override(word)
    except HydraException:
        key, equals, text = word.partition("=")
        if not equals:
            raise
        quoted = text.replace("\\", "\\\\").replace("'", "\\'")
        return parser.parse_override(f"{key}='{quoted}'")


def _compose(choices: dict[str, str]) -> Any:
    chosen = _defaults() | choices
    chosen["schedule"] = choices.get("schedule") or _schedule_of(chosen["method"], chosen["dataset"])
    named = choices | {"schedule": chosen["schedule"]}
    GlobalHydra.instance().clear()  # Hydra keeps its state in the process, and a sweep composes many configs
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        try:
            tree = compose("config", overrides=[f"{group}={choice}" for group, choice in named.items()])
        except HydraException as error:
            raise ValueError(f"configs: {_first_line(error)}") from error
    OmegaConf.set_struct(tree, False)  # so that `load_config` may add keys
    return tree


def _defaults() -> dict[str, str]:
    """Return the default choice of every group, from configs/config.yaml."""
    entries = OmegaConf.load(configs_folder() / "config.yaml").defaults
    return {group: choice for entry in entries if isinstance(entry, Mapping) for group, choice in entry.items()}


def _schedule_of(method: str, dataset: str) -> str:
    name = f"{method}_{dataset}"
    if name not in available("schedule"):
        known = [s for d in available("dataset") if (s := f"{method}_{d}") in available("schedule")]
        raise ValueError(
            f"method={method} dataset={dataset}: no schedule is known for this pair; needed one of "
            f"{', '.join(known) or f'none: write configs/schedule/{name}.yaml'}; "
            f"name it: schedule={(known or [name])[0]}"
        )
    return name


def _line(problem: Any, tree: dict[str, Any]) -> str:
    """Put one of pydantic's errors into our words: key, found, needed."""
    keys = _path(problem["loc"], tree)
    key = ".".join(map(str, keys))
    found = problem.get("input")
    kind = problem["type"]
    if kind == "extra_forbidden":
        # One that looks alike in the same place, else the same one further down, as epochs in method.stages.train.
        near = _nearest(str(keys[-1]), _known(keys[:-1], tree))
        parent = ".".join(map(str, keys[:-1]))
        meant = [f"{parent + '.' if parent else ''}{near[0]}"] if near else _deeper(key, tree)[:1]
        hint = f"; did you mean {meant[0]}?" if meant else ""
        return f"{key}: unknown key{hint}"
    if kind == "missing":
        return f"{key}: not set; needed a value"
    if kind in ("union_tag_invalid", "union_tag_not_found", "literal_error"):
        expected = problem.get("ctx", {}).get("expected_tags") or problem.get("ctx", {}).get("expected", "")
        if kind.startswith("union"):
            name = found.get("name") if isinstance(found, dict) else found
            return f"{key}.name = {name}: unknown; needed one of {expected}"
        return f"{key} = {found}: needed {expected}"
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if isinstance(found, dict | list | BaseModel):
        return f"{key}: {text}" if key else text
    return f"{key} = {found}: {text[0].lower() + text[1:]}"


def _nearest(key: str, known: list[str]) -> list[str]:
    """Return the known key that was probably meant: a longer one that starts with it, or one that looks alike."""
    longer = [name for name in known if name.startswith(f"{key}_")]
    return longer[:1] or difflib.get_close_matches(key, known, 1)


def _path(loc: tuple[Any, ...], tree: Any) -> list[Any]:
    """Return the keys as the operator wrote them, without the tags that pydantic inserts for chosen pieces."""
    keys: list[Any] = []
    for part in loc:
        if isinstance(tree, dict) and part not in tree and part == tree.get("name"):
            continue
        keys.append(part)
        tree = tree.get(part) if isinstance(tree, dict) else None
    return keys


def _known(keys: list[Any], tree: Any) -> list[str]:
    """Return the field names of the schema below some keys."""
    # Follow the keys through the annotations of the schema: nested models, dict[str, model], and pieces, whose model
    # depends on the name in the tree.
    model: Any = RunConfig
    for key in keys:
        tree = tree.get(key, {}) if isinstance(tree, dict) else {}
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            model = getattr(model, "__args__", (None, None))[-1]  # dict[str, StageConfig]
            continue
        field = model.model_fields.get(key)
        if field is None:
            return []
        of = next((m for m in field.metadata if isinstance(m, PieceOf)), None)
        if of is not None:
            name = tree.get("name") if isinstance(tree, dict) else None
            model = piece(of.kind, name).Config if name in registered_names(of.kind) else None
        else:
            model = field.annotation
            if not hasattr(model, "model_fields"):
                inner = [a for a in getattr(model, "__args__", ()) if hasattr(a, "model_fields")]
                is_mapping = getattr(model, "__origin__", None) is dict
                model = model if is_mapping or not inner else inner[0]
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _deeper(key: str, tree: dict[str, Any], above: str = "") -> list[str]:
    """Return the full keys of a tree that end with a short one: `method.stages.train.epochs` for `epochs`."""
    found = []
    for name, value in tree.items():
        full = f"{above}{name}"
        if above and full.endswith(f".{key}"):
            found.append(full)
        if isinstance(value, dict):
            found += _deeper(key, value, f"{full}.")
    return found


def _title(words: list[str]) -> str:
    return " ".join(words) if words else "the default config"


def _message(title: str, lines: list[str]) -> str:
    return f"{title}: {len(lines)} problem{'s' if len(lines) > 1 else ''}\n" + "\n".join(f"  {line}" for line in lines)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
