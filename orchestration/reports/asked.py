"""The wishes of a study for its reports, the key `report` of its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from orchestration.config.words import message
from orchestration.reports.published import published_tables


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Evaluation(_Keys):
    """A measurement of finished runs that a study makes before its last report, as `expertail evaluate` does."""

    recipe: str
    """Words of the recipe, e.g. `method=tade`; the runs whose labels have them are measured."""
    weights: Literal["test-time", "known-prior", "uniform"] = "test-time"
    """The rule by which experts are weighted."""
    distribution: str = "published"
    """Test distributions."""


class Asked(_Keys):
    """The wishes of a study for its reports."""

    model: Literal["last", "best"] = "last"
    """Which model of every run is shown."""
    tables: tuple[str, ...] | None = None
    """Published tables whose rows alone stand beside runs; unset: what was published for each run."""
    evaluate: tuple[Evaluation, ...] = Field(default=())
    """Measurements to take once all runs have ended."""

    @field_validator("tables")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [name for name in value or () if name not in published_tables()]
        if unknown:
            raise ValueError(f"no table {', '.join(unknown)}; known: {', '.join(published_tables())}")
        return value


def asked_of(report: Mapping[str, Any] | None, origin: str) -> Asked:
    """Read the key `report` of a study.

    Raises:
        ValueError: a key or value is unknown; `origin` says where it stands.
    """
    if problems := report_problems(report):
        raise ValueError(message(origin, problems))
    return Asked.model_validate(dict(report or {}))


def report_problems(report: Mapping[str, Any] | None) -> list[str]:
    """Return what is wrong with the key `report` of a study."""
    try:
        Asked.model_validate(dict(report or {}))
    except ValidationError as error:
        return [f"report.{'.'.join(map(str, one['loc']))}: {_needed(one)}" for one in error.errors()]
    return []


def _needed(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key; known: {', '.join(Asked.model_fields)}"
    return f"{error['msg'].removeprefix('Value error, ')}; found {error['input']!r}"
