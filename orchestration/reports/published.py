"""Published results that may stand beside a run: those of tables in papers, and the one of its recipe.

configs/published_tables.yaml has whole tables, row by row; configs/published.yaml one result per recipe and data set,
which composing a config lays into it (`method.expected`). A row of a table fits a run if recipe, data set and every
condition are met: a number of other epochs or another backbone is never shown.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from orchestration.config.folders import configs_folder
from orchestration.config.identity import flatten, published_result
from orchestration.config.layers import read_yaml
from orchestration.config.run_config import RunConfig
from orchestration.reports.rows import recipe_name, stages_to
from orchestration.results.tables import CLASS_GROUPS

Column = Literal["all", "many", "medium", "few", "error", "upper", "relative"]
_STAGE = "stage."  # of a condition: a key of every stage that learns the trunk, as in the files of recipes
_ABSENT = object()
_USUAL = {"dataset.augment.pieces": None, "stage.augment": None, "run.max_steps": None}
"""Published with the data set's own augmentation, unless the conditions name another, and with all epochs."""


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Row(_Keys):
    """Conditions that a run must meet for a row of a table to stand beside it."""

    recipe: str
    """As composed, with its final stage where it has several: ce+ncm."""
    conditions: dict[str, Any] = Field(default_factory=dict)
    remark: str = ""


class _Block(_Keys):
    """Rows of a table that share conditions."""

    conditions: dict[str, Any] = Field(default_factory=dict)
    rows: dict[str, tuple[float | None, ...]]
    """Values by row, as many as columns; None where nothing is printed."""


class PublishedTable(_Keys):
    """A table of a paper; the head of configs/published_tables.yaml explains its keys."""

    source: str
    remark: str = ""
    dataset: str
    columns: tuple[Column, ...]
    groups: Literal["by_count", "by_index"] = "by_count"
    conditions: dict[str, Any] = Field(default_factory=dict)
    recipes: dict[str, _Row]
    copied: tuple[str, ...] = ()
    notes: dict[str, str] = Field(default_factory=dict)
    blocks: tuple[_Block, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """The labels of all rows, in order."""
        return tuple(dict.fromkeys(label for block in self.blocks for label in block.rows))

    @property
    def origin(self) -> str:
        """Where the numbers are from, and what holds for all of them."""
        return f"{self.source}; {self.remark}" if self.remark else self.source

    def remarks(self, label: str) -> tuple[str, ...]:
        """Return what must be said of a row."""
        copied = "taken over from its own paper" if label in self.copied else ""
        return tuple(filter(None, (self.recipes[label].remark, copied, self.notes.get(label, ""))))


@dataclass(frozen=True)
class Published:
    """A published result beside a row.

    Attributes:
        table: name of its table; "" for the result of a recipe.
        row: label in the table; "", too.
        values: percent by measure: `all`, groups as in `BY_COUNT` and `BY_INDEX`, `upper` and `relative`.
        source: where it is from.
        remarks: what the source leaves open, what does not fit together in it.
    """

    table: str
    row: str
    values: Mapping[str, float]
    source: str
    remarks: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """Its name beside a row."""
        return self.row or "its recipe"


def printed(value: float) -> str:
    """Return a published value as papers print it, with one decimal or more."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:g}"


@functools.cache
def published_tables() -> dict[str, PublishedTable]:
    """Return all tables by name."""
    path = configs_folder() / "published_tables.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    content = loader(path.read_text("utf-8")).get_single_data()
    return {name: PublishedTable.model_validate(table) for name, table in content.items()}


def published_for(config: RunConfig, stage: str = "", tables: Sequence[str] | None = None) -> Published | None:
    """Return what was published for a run, or None if nothing was for exactly its conditions.

    Args:
        config: of the run.
        stage: the final stage that the result is of, where a recipe has several; else "".
        tables: names of tables whose rows alone may stand there, those of several together; None for the result of the
            recipe, or else the first row of any table that fits.
    """
    final = stage or config.method.final
    if tables is None:
        expected = published_result(config) if final == config.method.final else None
        if expected is not None:
            return Published("", "", expected.top1, expected.remark)
        return next(_fitting(config, stage, tuple(published_tables())), None)
    found = [*_fitting(config, stage, tables)]
    if not found:
        return None
    values = {key: value for one in reversed(found) for key, value in one.values.items()}
    order = {key: values[key] for one in found for key in one.values}
    remarks = tuple(dict.fromkeys(remark for one in found for remark in one.remarks))
    sources = "; ".join(dict.fromkeys(one.source for one in found))
    return replace(found[0], values=order, source=sources, remarks=remarks)


def _fitting(config: RunConfig, stage: str, names: Sequence[str]) -> Iterator[Published]:
    """Yield the rows of tables whose conditions a run meets."""
    recipe, final, data = recipe_name(config, stage), stage or config.method.final, _data_conditions()
    flat: dict[str, Any] = {}
    for name in names:
        table = published_tables()[name]
        rows = {label: row for label, row in table.recipes.items() if row.recipe == recipe}
        if not rows or table.dataset != config.dataset.name:
            continue
        flat = flat or flatten(config.model_dump(mode="json"))
        for (label, row), block in itertools.product(rows.items(), table.blocks):
            conditions = _USUAL | data.get(table.dataset, {}) | table.conditions | block.conditions | row.conditions
            values = _values(table, block, label)
            if values and _met(config, flat, final, conditions):
                yield Published(name, label, values, table.origin, table.remarks(label))


def _data_conditions() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read_yaml(configs_folder() / "published.yaml")["conditions"]
    return found


def _values(table: PublishedTable, block: _Block, label: str) -> dict[str, float]:
    """Return the values of a row by measure; an error becomes an accuracy."""
    # Copied rows have the groups of their own papers, which are by count.
    by_index = table.groups == "by_index" and label not in table.copied
    found = {}
    for column, value in zip(table.columns, block.rows.get(label, ()), strict=False):
        if value is not None:
            measure = f"{column}_by_index" if by_index and column in CLASS_GROUPS else column
            found["all" if column == "error" else measure] = 100 - value if column == "error" else value
    return found


def _met(config: RunConfig, flat: Mapping[str, Any], final: str, conditions: Mapping[str, Any]) -> bool:
    """Say whether a run meets all conditions of a row."""
    wanted: dict[str, Any] = {}
    for key, value in conditions.items():
        if key.startswith(_STAGE):
            wanted |= {f"method.stages.{s}.{key.removeprefix(_STAGE)}": value for s in _trunk_stages(config, final)}
    wanted |= {key: value for key, value in conditions.items() if not key.startswith(_STAGE)}
    return all(flat.get(key, _ABSENT) == value for key, value in wanted.items())


def _trunk_stages(config: RunConfig, final: str) -> list[str]:
    """Return the stages that train the network a result is of; heads that follow on frozen features are none."""
    stages = config.method.stages
    started = [name for name in stages_to(config, final) if stages[name].epochs]
    return [name for name in started if config.method.stage_before(name) is None or "trunk" not in stages[name].freeze]
