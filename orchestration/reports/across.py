"""Values that a study varies across the tables of a report: of data, as an imbalance ratio, or training's length.

Rows of different tables are not compared. They stand one below the other here, each with the sizes of groups of its own
data, because they are what the study varies.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestration.reports.rows import Row, Table, short_key


class Member(NamedTuple):
    """A row, with the value that it has of the key, as text and as a number where it is one."""

    value: str
    number: float | None
    row: Row
    table: Table


@dataclass(frozen=True)
class Across:
    """A key whose values lie in different tables.

    Attributes:
        key: that varies.
        families: rows by recipe: in rising order of numbers, else as they were given.
    """

    key: str
    families: dict[str, tuple[Member, ...]]

    @property
    def name(self) -> str:
        return short_key(self.key)

    @property
    def members(self) -> list[Member]:
        return [member for members in self.families.values() for member in members]

    @property
    def numeric(self) -> bool:
        """Whether every value is a number."""
        return all(member.number is not None for member in self.members)


def across(tables: Sequence[Table], axes: Collection[str], varied: Collection[str]) -> list[Across]:
    """Return the axes of a study whose values lie in different tables.

    Args:
        tables: of the report.
        axes: keys that the study gives several values.
        varied: keys in which labels of its runs differ; others are not worth naming.
    """
    found = []
    for key in sorted(axes):
        families: dict[str, list[Member]] = {}
        for table in tables:
            for row in table.rows:
                value = (row.records[0].label or {}).get(key)
                if value is not None:
                    families.setdefault(_family(row, key, varied), []).append(Member(value, _number(value), row, table))
        several = {
            name: members for name, members in families.items() if len({one.table.number for one in members}) > 1
        }
        if several:
            found.append(Across(key, {name: tuple(_in_order(members)) for name, members in several.items()}))
    return found


def _family(row: Row, key: str, varied: Collection[str]) -> str:
    """Return what a row is called without a key. Keys of the data, which its own table does not name, are named."""
    label = row.records[0].label or {}
    words = [word for word in row.label.split(" ") if word != f"{short_key(key)}={label[key]}"]
    data = [f"{short_key(k)}={v}" for k, v in label.items() if k != key and k in varied and k.startswith("dataset")]
    return " ".join([*words, *data])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _in_order(members: Sequence[Member]) -> list[Member]:
    numbers = [one.number for one in members]
    if any(number is None for number in numbers):
        return list(members)
    return sorted(members, key=lambda one: one.number or 0.0)
