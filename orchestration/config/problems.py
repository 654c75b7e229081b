"""The problems of a config in our words: key, found, needed, and which file it comes from."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from experts.registry import PieceOf, piece, registered_names
from experts.renamed import RENAMED
from orchestration.config.run_config import RunConfig
from orchestration.config.words import message

_NEEDED = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_": "text",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
}
"""By the start of the type of one of pydantic's errors: what is needed. The longest start that fits counts."""
_FEW = 8  # keys that a message may list

Origin = Callable[[list[str]], str | None]
"""The layer that set the value at some keys, for problems to name it; None where the operator wrote it."""


def check(tree: dict[str, Any], title: str, origin: Origin = lambda keys: None) -> RunConfig:
    """Validate a nested mapping against the schema.

    Raises:
        ValueError: the title, then one line per problem: key, what was found, what is needed.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = {_line(problem, tree, origin): None for problem in error.errors()}
    raise ValueError(message(title, sorted(_join_lines(list(lines)))))


def _line(problem: Any, tree: dict[str, Any], origin: Origin) -> str:
    """Put one of pydantic's errors into our words: key, found, needed."""
    keys = _path(problem["loc"], tree)
    key, kind = ".".join(map(str, keys)), problem["type"]
    if kind == "extra_forbidden":
        layer = origin(keys)
        return f"{key}: {_unknown_key(keys, tree)}{f' (from {layer})' if layer else ''}"
    if kind == "missing":
        return f"{key}: not set; needed a value"
    if kind.startswith("union_tag") or kind == "model_attributes_type":
        return _wrong_piece(key, problem)
    return _wrong_value(keys, tree, problem)


def _wrong_value(keys: list[Any], tree: dict[str, Any], problem: Any) -> str:
    """Say what is wrong with the value of a known key."""
    key, found, kind = ".".join(map(str, keys)), problem.get("input"), problem["type"]
    if kind == "literal_error":
        return f"{key} = {found}: needed {problem.get('ctx', {}).get('expected', '')}"
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    starts = [start for start in _NEEDED if kind.startswith(start)]
    if isinstance(found, dict | list) and starts:
        return f"{key}: needed {_NEEDED[max(starts, key=len)]}, found {_what(found)}"
    if isinstance(found, dict | list | BaseModel):
        return f"{key}: {text}" if key else text
    if kind == "model_type":
        model, _ = _model_at(keys, tree)
        text = f"needed the keys {', '.join(model.model_fields)}" if model else "needed a mapping"
    if starts:
        text = "needed " + _NEEDED[max(starts, key=len)].format(**problem.get("ctx", {}))
    if isinstance(found, float) and 0 < found < 1 and kind.startswith("int"):
        text += f"; a share of the stage is written {found:.3%}".replace(".000%", "%")
    return f"{key} = {found}: {text[0].lower() + text[1:]}"


def _join_lines(lines: list[str]) -> list[str]:
    """Make one line of those about one value: what each of the types that its key may have says of it."""
    by_value: dict[str, list[str]] = {}
    for line in lines:
        value, _, text = line.partition(": ")
        if " = " in value:
            by_value.setdefault(f"{value}: ", []).append(text)
        else:
            by_value[line] = []
    return [value + ", or ".join(texts).replace(", or needed ", ", or ") for value, texts in by_value.items()]


def _wrong_piece(key: str, problem: Any) -> str:
    """Say what is wrong with a mapping that should name a piece."""
    found = problem.get("input")
    if problem["type"] == "model_attributes_type" and not isinstance(found, str):
        return f"{key}: needed the name of a piece, found {_what(found)}; set {key}.name"
    if isinstance(found, str):
        return f"{key} = {found}: a piece is set by its name; needed {key}.name={found}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.name: not set; needed the name of a piece"
    name = found.get("name") if isinstance(found, dict) else found
    return f"{key}.name = {name}: unknown; needed one of {problem['ctx']['expected_tags']}"


def _what(found: Any) -> str:
    """Return a value as a message names it: lists and mappings by their kind, as they may be long."""
    if isinstance(found, list | dict):
        return "a list" if isinstance(found, list) else "a mapping"
    return "null" if found is None else str(found)


def _nearest(key: str, known: list[str]) -> list[str]:
    """Return the known key that was probably meant: a longer one that starts with it, or one that looks alike."""
    longer = [name for name in known if name.startswith(f"{key}_")]
    return longer[:1] or difflib.get_close_matches(key, known, 1)


def _path(loc: tuple[Any, ...], tree: Any) -> list[Any]:
    """Return the keys as the operator wrote them, without the tags that pydantic inserts.

    It does so for chosen pieces, and below a value for each of the types that it may have.
    """
    keys: list[Any] = []
    for part in loc:
        if isinstance(tree, str | int | float):
            break
        if isinstance(tree, dict) and part not in tree and part == tree.get("name"):
            continue
        keys.append(part)
        if isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return keys


def _unknown_key(keys: list[Any], tree: dict[str, Any]) -> str:
    """Say of what a key is unknown, and what was probably meant."""
    last, parents = str(keys[-1]), keys[:-1]
    model, kind = _model_at(parents, tree)
    if kind is not None and model is not None:
        having = [f"'{name}'" for name in registered_names(kind) if last in piece(kind, name).Config.model_fields]
        if having:
            name = model.model_fields["name"].default
            have = f"{', '.join(having[:-1])} and {having[-1]} have" if having[1:] else f"{having[0]} has"
            return f"{kind} '{name}' has no key {last}; {have}"
    # One that looks alike in the same place, else the same one further down, as epochs in method.stages.train.
    near = _nearest(last, list(model.model_fields) if model else [])
    parent = ".".join(map(str, parents))
    meant = [f"{parent + '.' if parent else ''}{near[0]}"] if near else _deeper(".".join(map(str, keys)), tree)[:1]
    if last in RENAMED:
        stage = parent or next((f"method.stages.{name}" for name in tree["method"]["stages"]), "")
        meant = [f"{stage}.{RENAMED[last].key}"]
    if meant:
        return f"unknown key; did you mean {meant[0]}?"
    few = model is not None and len(model.model_fields) <= _FEW
    return "unknown key" + (f"; known: {', '.join(model.model_fields)}" if model and few else "")


def _model_at(keys: list[Any], tree: Any) -> tuple[type[BaseModel] | None, str | None]:
    """Return the model of the schema below some keys, and the kind of piece that it configures, if it does."""
    # Follow the keys through the annotations of the schema: nested models, dict[str, model], and pieces, whose model
    # depends on the name in the tree.
    model: Any = RunConfig
    kind: str | None = None
    for key in keys:
        if isinstance(tree, list):
            tree = tree[key] if isinstance(key, int) and key < len(tree) else {}
        else:
            tree = tree.get(key, {}) if isinstance(tree, dict) else {}
        if isinstance(key, int) and hasattr(model, "model_fields"):
            continue  # of a tuple of models, whose model is known already
        kind = None
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(key)
            if field is None:
                return None, None
            metadata: Any = field.metadata
            model = field.annotation
        else:
            # dict[str, StageConfig]; of pieces, dict[str, Annotated[Any, PieceOf(...)]], or a tuple of them
            args = [arg for arg in getattr(model, "__args__", ()) if arg is not Ellipsis]
            model = args[-1] if args else None
            metadata = getattr(model, "__metadata__", ())
        of = next((mark for mark in metadata if isinstance(mark, PieceOf)), None)
        if of is not None:
            name = tree.get("name") if isinstance(tree, dict) else None
            kind, model = of.kind, piece(of.kind, name).Config if name in registered_names(of.kind) else None
        elif not hasattr(model, "model_fields"):
            inner = [a for a in getattr(model, "__args__", ()) if hasattr(a, "model_fields")]
            is_mapping = getattr(model, "__origin__", None) is dict
            model = model if is_mapping or not inner else inner[0]
    return (model, kind) if hasattr(model, "model_fields") else (None, None)


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
