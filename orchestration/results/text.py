"""Numbers in words and in tables of text."""

from __future__ import annotations

from collections.abc import Iterator


def grid(rows: list[list[str]], left: tuple[int, ...]) -> Iterator[str]:
    """Rows as lines with columns in line; `left` are those that begin at the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def plural(count: int, thing: str) -> str:
    """So many things."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def number(value: int | None) -> str:
    """Of any size, or n/a."""
    return "n/a" if value is None else f"{value:,}"


def bytes_(value: int | None) -> str:
    """In units of 1000, or n/a."""
    if value is None:
        return "n/a"
    if value < 1000:
        return f"{value} B"
    for unit, size in (("KB", 1e3), ("MB", 1e6)):
        if value < 1000 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e9:.3g} GB"


def duration(seconds: float) -> str:
    """In the unit that fits."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
