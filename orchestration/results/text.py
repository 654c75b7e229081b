"""Numbers in words, and tables of plain text."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Sequence

from experts.data.names import visible

_GAP = 2  # spaces between columns


def listed(text: str) -> list[str]:
    """Return the items of a list with commas; quotes keep a comma in an item: `cat,"boots, high"`."""
    return [item.strip() for items in csv.reader([text], skipinitialspace=True) for item in items]


def text_table(
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    rule: bool = False,
    spans: Sequence[tuple[str, int]] = (),
) -> list[str]:
    """Lay out rows as lines whose columns stand below each other, without trailing spaces.

    Args:
        rows: of equally many cells; the first row holds the headings.
        left: the columns that are aligned left; the others are aligned right.
        rule: draw a line below the headings.
        spans: headings above the headings: text, and over how many columns it reaches. A text that is wider than its
            columns widens them.
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    above = [_spanning_line(widths, spans)] if spans else []
    head, *body = (
        (" " * _GAP).join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    ruled = ["-" * len(head)] if rule else []
    return [line.rstrip() for line in (*above, head, *ruled, *body)]


def _spanning_line(widths: list[int], spans: Sequence[tuple[str, int]]) -> str:
    """Return the line above the headings, and widen columns that are too narrow for it."""
    cells, start = [], 0
    for text, count in spans:
        columns = range(start, start + count)
        missing = len(text) - sum(widths[column] for column in columns) - _GAP * (count - 1)
        # Widen the columns in turn, from the right, so that they stay alike.
        for extra in range(max(missing, 0)):
            widths[columns[-1 - extra % count]] += 1
        room = sum(widths[column] for column in columns) + _GAP * (count - 1)
        cells.append(text.rjust(room) if start else text.ljust(room))
        start += count
    return (" " * _GAP).join(cells)


def plural(count: int, thing: str) -> str:
    """Return a count and the thing it counts: 1 worker, 2 workers."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def number(value: int | None) -> str:
    """Return a whole number with separators, or n/a."""
    return "n/a" if value is None else f"{value:,}"


def decimals(value: float | None, scale: float, digits: int) -> str:
    """Return a value times `scale` with so many decimals, or n/a where it is missing or not a number."""
    return "n/a" if value is None or math.isnan(value) else f"{value * scale:.{digits}f}"


def bytes_(value: int | None) -> str:
    """Return an amount in bytes, KB, MB or GB (powers of 1000), or n/a."""
    if value is None:
        return "n/a"
    if value < 1000:
        return f"{value} B"
    for unit, size in (("KB", 1e3), ("MB", 1e6)):
        if value < 1000 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e9:.3g} GB"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, whichever fits."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
