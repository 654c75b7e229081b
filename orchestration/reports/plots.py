"""Shared parts of the pictures of a report: colours of rows, labels that do not lie on each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experts.data.names import visible
from orchestration.reports.records import BY_COUNT, BY_INDEX
from orchestration.reports.report import Section
from orchestration.reports.rows import Row
from orchestration.results.style import GROUP_COLOURS, set_figure_title

ALL = "#1b1b1b"
BASE = "#3b6fb6"
SOFT = "#b9b9b9"
_MOST = 34  # characters of a label


def short_label(label: str) -> str:
    """Cut a label to what fits beside a plot."""
    label = visible(label)
    return label if len(label) <= _MOST else f"{label[: _MOST - 1]}…"


def colour_of(key: str) -> str:
    """Return the colour of a group of classes; black stands for all."""
    return GROUP_COLOURS.get(key.removesuffix("_by_index"), ALL)


def group_keys(section: Section, rule: Sequence[str]) -> list[str]:
    """Return the groups of a rule that have a class, with `all` in front; [] where there is none."""
    keys = [key for key in rule if key in section.measures]
    return ["all", *keys] if keys else []


def rules_of(section: Section) -> dict[str, list[str]]:
    """Return the keys of each rule that groups the classes here, by the words for it."""
    rules = {"classes by number of training images": BY_COUNT, "classes by index": BY_INDEX}
    found = {words: group_keys(section, rule) for words, rule in rules.items()}
    return {words: keys for words, keys in found.items() if keys} or {"all classes": ["all"]}


def percent(spread: tuple[float | None, float | None]) -> tuple[float, float]:
    """Return a mean and its standard deviation in percent: NaN without a mean, 0 without a spread."""
    mean, sd = spread
    return (np.nan if mean is None else 100 * mean, 0.0 if sd is None else 100 * sd)


def points(rows: Sequence[Row], key: str, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations of rows in percent, [R] each."""
    found = np.array([percent(row.spread(key, which)) for row in rows], dtype=float)
    return found[:, 0], found[:, 1]


def label_beside(axes: Any, x: np.ndarray, y: np.ndarray, labels: Sequence[str], strong: Mapping[int, str]) -> None:
    """Write a label right of the axes for each point, with a line to it; labels keep apart from each other.

    Args:
        axes: whose limits are final.
        x, y: of the points, in data.
        labels: as many.
        strong: colours of labels that stand out, by number.
    """
    figure = axes.figure
    height = figure.get_figheight() * axes.get_position().height * 72  # points
    step = min(9.5 / max(height, 1.0), 1.0 / max(len(labels), 1))  # of the axes' height, one line of small text
    to_axes = axes.transData.transform(np.stack([x, y], axis=1))
    place = axes.transAxes.inverted().transform(to_axes)
    heights = spread_out(place[:, 1], step)
    for number, label in enumerate(labels):
        colour = strong.get(number, "#3c3c3c")
        axes.annotate(
            short_label(label), xy=(x[number], y[number]), xycoords="data", xytext=(1.04, heights[number]),
            textcoords="axes fraction", va="center", ha="left", fontsize=7, color=colour, annotation_clip=False,
            zorder=1, fontweight="bold" if colour == BASE else "normal",
            arrowprops={"arrowstyle": "-", "color": "#d2d2d2", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip


def spread_out(wanted: np.ndarray, step: float) -> np.ndarray:
    """Return places in [0, 1] near the wanted ones, in the same order, at least `step` apart.

    Labels that would lie on each other are put side by side around their common middle, block by block.
    """
    order = np.argsort(wanted, kind="stable")
    blocks: list[list[float]] = []  # middle, members
    for value in wanted[order]:
        blocks.append([float(np.clip(value, 0.0, 1.0)), 1.0])
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < step * (blocks[-1][1] + blocks[-2][1]) / 2:
            b, a = blocks.pop(), blocks.pop()
            size = a[1] + b[1]
            middle = (a[0] * a[1] + b[0] * b[1]) / size
            half = step * (size - 1) / 2
            blocks.append([float(np.clip(middle, half, max(1.0 - half, half))), size])
    found = np.empty(len(wanted))
    places = [middle + step * (i - (size - 1) / 2) for middle, size in blocks for i in range(int(size))]
    found[order] = places
    return found


def title(figure: Any, section: Section, text: str) -> None:
    """Write above a picture what it shows, and of which data."""
    data, schedule = section.table.data, section.table.schedule
    set_figure_title(figure, f"{text}\n{data.name}, {schedule.backbone}, {schedule.length}")


def grid_of(count: int, widest: int = 6) -> tuple[int, int]:
    """Return rows and columns for so many small panels."""
    columns = min(widest, max(1, int(np.ceil(np.sqrt(1.4 * count)))))
    return -(-count // columns), columns
