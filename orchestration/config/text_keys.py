"""The keys whose values are names or paths: taken as typed, even where they look like a number or a list."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from orchestration.config.run_config import RunConfig


def is_text(path: Sequence[str]) -> bool:
    """Say whether the value at some keys is text, or text and null, and nothing else."""
    kinds: list[Any] = [RunConfig]
    for key in path:
        kinds = [kind for holder in kinds for kind in _below(holder, key)]
    return str in kinds and not set(kinds) - {str, type(None)}


def _below(holder: Any, key: str) -> Iterator[Any]:
    """Yield the types that a key of a mapping or a model may have."""
    if get_origin(holder) is dict:
        yield from _alternatives(get_args(holder)[1])
    elif isinstance(holder, type) and issubclass(holder, BaseModel) and key in holder.model_fields:
        yield from _alternatives(holder.model_fields[key].annotation)


def _alternatives(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for each in get_args(kind):
            yield from _alternatives(each)
    else:
        yield kind
