"""Pieces by name: a recipe names them, this table finds them.

A piece is a class with a nested (or attached) `Config`, a frozen pydantic model whose field `name` is the literal it is
registered under. Pieces of one kind are built alike: `build("objective", config, ...)` calls the class registered
under `config.name` with the config first and the rest as given.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import operator
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler


class Settings(BaseModel):
    """Base of every config: unknown keys are errors, values never change, field docstrings say unit and meaning."""

    # pydantic would collect those docstrings by parsing every class again, a third of the time that the package loads.
    model_config = ConfigDict(frozen=True, extra="forbid")


P = TypeVar("P", bound=type)
_PIECES: dict[str, dict[str, Any]] = {}
_ABOVE = __name__.removesuffix("experts.registry")
"""What our packages lie below: nothing, but for the copy that an MLflow model brings."""


def register(kind: str, name: str) -> Callable[[P], P]:
    """Claim `name` for a class among the pieces of one kind.

    Raises:
        TypeError: the class has no `Config` whose field `name` is the literal.
        ValueError: another class has claimed the name.
    """

    def claim(cls: P) -> P:
        config = getattr(cls, "Config", None)
        if config is None or get_args(config.model_fields["name"].annotation) != (name,):
            raise TypeError(f"{kind} '{name}': {cls.__qualname__}.Config needs a field  name: Literal['{name}']")
        holder = _PIECES.setdefault(kind, {}).setdefault(name, cls)
        if holder is not cls:
            owner = f"{holder.__module__}.{holder.__qualname__}"
            raise ValueError(f"{kind} '{name}' is already {owner}; choose another name")
        return cls

    return claim


def registered_names(kind: str) -> list[str]:
    """Return the registered names of one kind, sorted."""
    return sorted(_PIECES.get(kind, {}))


def piece(kind: str, name: str) -> Any:
    """Return the class registered under a name.

    Raises:
        ValueError: no such name; the message lists the known ones and the nearest.
    """
    try:
        return _PIECES[kind][name]
    except KeyError:
        near = difflib.get_close_matches(name, registered_names(kind), n=1)
        hint = f", did you mean '{near[0]}'" if near else ""
        raise ValueError(
            f"no {kind} is called '{name}'{hint}; known: {', '.join(registered_names(kind)) or 'none'}"
        ) from None


def registered_name(cls: Any) -> str:
    """Return the name that a piece is registered under, as its `Config` says it."""
    return str(get_args(cls.Config.model_fields["name"].annotation)[0])


def build(kind: str, config: Any, *args: Any, **kwargs: Any) -> Any:
    """Build the piece that a config names."""
    return piece(kind, config.name)(config, *args, **kwargs)


def choice(kind: str) -> Any:
    """Return the annotation of a field that holds the config of any piece of one kind, distinguished by `name`."""
    configs = [_PIECES[kind][name].Config for name in registered_names(kind)]
    # pydantic accepts a discriminator on a union only, and a union of one class is that class.
    if len(configs) == 1:
        return configs[0]
    return Annotated[functools.reduce(operator.or_, configs), Field(discriminator="name")]


class PieceOf:
    """Marks a field for the config of any registered piece of one kind; its `name` says which.

    A piece whose own config has such a field for its own kind sets `defer_build=True`: the other pieces of the kind are
    not registered yet while its class is made. So does a config that names a `package`, whose modules are imported when
    its schema is built, for those who use it alone.
    """

    def __init__(self, kind: str, *, optional: bool = False, package: str | None = None) -> None:
        self.kind = kind
        self.optional = optional
        self.package = package

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        if self.package is not None:
            import_pieces(importlib.import_module(_ABOVE + self.package))
        chosen = choice(self.kind)
        return handler.generate_schema(chosen | None if self.optional else chosen)


def import_pieces(*packages: ModuleType) -> None:
    """Import every module below the given packages, so that all their pieces are registered."""
    for package in packages:
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
