"""Pictures of accuracy: by group with spread, against cost, against relative accuracy, against a number that varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestration.reports.across import Across
from orchestration.reports.plots import (
    ALL,
    BASE,
    colour_of,
    label_beside,
    percent,
    points,
    rules_of,
    short_label,
    title,
)
from orchestration.reports.records import BY_COUNT
from orchestration.reports.report import Report, Section
from orchestration.reports.rows import Row
from orchestration.results.style import draw_in_decades, new_figure, set_figure_title, shorten

_LABEL_INCHES = 2.3
_AXIS_INCHES = 0.725  # left of a panel, for its numbers and words
_WIDE = 30  # values that span more than this factor are drawn in decades


def groups_figure(report: Report, section: Section) -> Any:
    """Draw a line of dots for every row: all, many, medium, few, with a bar of one standard deviation to each side."""
    from matplotlib.transforms import ScaledTranslation

    rules, rows = rules_of(section), section.table.rows
    key = section.rarest
    means, _ = points(rows, key, report.which)
    order = np.argsort(np.nan_to_num(means, nan=-1.0), kind="stable")  # the best on the rarest classes on top
    figure = new_figure(2.6 + 4.2 * len(rules), 1.7 + 0.235 * len(rows))
    title(figure, section, f"Top-1 by group of classes, mean and standard deviation over seeds ({report.which} model)")
    all_axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    y = np.arange(len(rows))
    base = section.comparison.baseline if section.comparison else None
    for axes, (words, keys) in zip(all_axes, rules.items(), strict=True):
        for place in range(0, len(rows), 2):
            axes.axhspan(place - 0.5, place + 0.5, color="#f6f7f9", zorder=0)
        for key in reversed(keys):
            mean, sd = points(rows, key, report.which)
            size = len(section.table.data.groups.get(key, ())) or len(section.table.data.counts)
            axes.errorbar(
                mean[order], y, xerr=sd[order], fmt="D" if key == "all" else "o", color=colour_of(key), zorder=3,
                markersize=4 if key == "all" else 5, elinewidth=1.1, label=f"{key.split('_')[0]} [{size:,}]",
            )  # fmt: skip
        axes.set_title(words)
        axes.set_xlabel("top-1, %")
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        handles, labels = axes.get_legend_handles_labels()
        below = axes.transAxes + ScaledTranslation(0, -0.45, figure.dpi_scale_trans)  # inches, below the axis' label
        axes.legend(handles[::-1], labels[::-1], loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4,
                    bbox_transform=below, columnspacing=1.2, handletextpad=0.3)  # fmt: skip
    all_axes[0].set_yticks(y, [short_label(rows[i].label) for i in order], fontsize=8)
    for text, i in zip(all_axes[0].get_yticklabels(), order, strict=True):
        if rows[i].label == base:
            text.set_color(BASE)
            text.set_fontweight("bold")
    return figure


def cost_figure(report: Report, section: Section) -> Any:
    """Draw accuracy on the rarest classes against multiply-adds of training and of inference; None without costs."""
    rows = [row for row in section.table.rows if section.costs[row.label].training and row.values(section.rarest)]
    if len(rows) < 2:
        return None
    mean, sd = points(rows, section.rarest, report.which)
    training = np.array([section.costs[row.label].training for row in rows], dtype=float) / 1e12
    inference = np.array([section.costs[row.label].inference for row in rows], dtype=float) / 1e6
    figure = new_figure(14.5, max(4.4, 1.6 + 0.15 * len(rows)))
    words = _words(section.rarest)
    title(figure, section, f"Top-1 on {words} classes against cost, mean and standard deviation over seeds")
    both = figure.subplots(1, 2)
    named = _named(section, rows)
    for axes, x, label in zip(
        both, (training, inference), ("training, 10^12 multiply-adds", "inference, million multiply-adds per image"),
        strict=True,
    ):  # fmt: skip
        _scatter(axes, x, mean, sd, named)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{words}, top-1 %")
        _scale(axes, x)
    _finish(figure, [(both[0], training), (both[1], inference)], mean, [row.label for row in rows], named)
    return figure


def relative_figure(report: Report, section: Section) -> Any:
    """Draw accuracy against relative accuracy, as the survey's Figure 4; None without references."""
    rows = [row for row in section.table.rows if row.label in section.relative]
    if not rows:
        return None
    y, y_sd = points(rows, "all", report.which)
    found = np.array([percent(section.relative[row.label].relative) for row in rows], dtype=float)
    figure = new_figure(8.4, max(4.4, 1.6 + 0.15 * len(rows)))
    title(figure, section, "Accuracy against relative accuracy: A_r = A_t / max(A_v, A_b)")
    axes = figure.add_subplot()
    named = _named(section, rows)
    _scatter(axes, found[:, 0], y, y_sd, named, found[:, 1])
    axes.set_xlabel("relative accuracy A_r, %")
    axes.set_ylabel("accuracy A_t, %")
    _finish(figure, [(axes, found[:, 0])], y, [row.label for row in rows], named)
    return figure


def against_figure(
    report: Report, section: Section, key: str, families: Mapping[str, Sequence[tuple[float, Row]]]
) -> Any:
    """Draw accuracy by group against a number that varies, a panel for each recipe that it varies in.

    Args:
        report, section: what is shown.
        key: the number's.
        families: value and row by recipe.
    """
    keys = next(iter(rules_of(section).values()))
    figure, panels = _panels(len(families))
    title(figure, section, f"Top-1 by group against {key}, mean and standard deviation over seeds")
    for axes, (name, members) in zip(panels, families.items(), strict=False):
        ordered = sorted(members, key=lambda one: one[0])
        _draw_against(axes, np.array([x for x, _ in ordered]), [row for _, row in ordered], keys, report.which)
        axes.set_title(short_label(name))
        axes.set_xlabel(key)
    panels[len(families) - 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def across_figure(report: Report, one: Across) -> Any:
    """Draw accuracy by group over a key whose values lie in different tables, a panel for each recipe."""
    figure, panels = _panels(len(one.families))
    names = ", ".join(dict.fromkeys(member.table.data.name for member in one.members))
    set_figure_title(figure, f"Top-1 by group over {one.name}, mean and standard deviation over seeds\n{names}")
    keys = ["all", *(key for key in BY_COUNT if any(member.table.data.groups.get(key) for member in one.members))]
    for axes, (name, members) in zip(panels, one.families.items(), strict=False):
        x = np.array([member.number if one.numeric else place for place, member in enumerate(members)], dtype=float)
        _draw_against(axes, x, [member.row for member in members], keys, report.which, joined=one.numeric)
        if not one.numeric:
            axes.set_xticks(x, [shorten(member.value) for member in members], rotation=20, ha="right")
            axes.set_xlim(-0.5, len(x) - 0.5)
        axes.set_title(short_label(name))
        axes.set_xlabel(one.name)
    panels[len(one.families) - 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _panels(count: int) -> tuple[Any, Any]:
    """Return a figure with so many panels, and those; what is over is hidden."""
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = new_figure(1.4 + 4.0 * columns, 1.0 + 3.3 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels


def _draw_against(
    axes: Any, x: np.ndarray, rows: Sequence[Row], keys: Sequence[str], which: str, *, joined: bool = True
) -> None:
    """Draw a line with its spread for each group; marks alone where values have no between."""
    for group in keys:
        mean, sd = points(rows, group, which)
        line = {"linewidth": 2.2 if group == "all" else 1.5} if joined else {"linestyle": ""}
        axes.errorbar(x, mean, yerr=sd, color=colour_of(group), marker="o", markersize=4, elinewidth=0.8,
                      label=group.split("_")[0], **line)  # fmt: skip
        if joined:
            axes.fill_between(x, mean - sd, mean + sd, color=colour_of(group), alpha=0.15, linewidth=0)
    if joined and x.min() > 0 and x.max() / x.min() > _WIDE:
        draw_in_decades(axes.xaxis)
    elif joined:
        axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_ylabel("top-1, %")


def _words(key: str) -> str:
    return {"all": "all", "few": "few-shot", "few_by_index": "the rarest (by index)"}[key]


def _named(section: Section, rows: Sequence[Row]) -> dict[int, str]:
    """Return colours of rows that stand out, by number: the baseline's, and red of those that really beat it."""
    found = {}
    for number, row in enumerate(rows):
        one = section.difference(row.label, section.rarest)
        if section.comparison and row.label == section.comparison.baseline:
            found[number] = BASE
        elif one is not None and one.real and one.mean > 0:
            found[number] = "#b8323f"
    return found


def _scatter(
    axes: Any, x: np.ndarray, y: np.ndarray, sd: np.ndarray, named: Mapping[int, str], x_sd: np.ndarray | None = None
) -> None:
    for number in range(len(x)):
        colour = named.get(number, ALL)
        axes.errorbar(
            x[number], y[number], yerr=sd[number], xerr=None if x_sd is None else x_sd[number], fmt="o", color=colour,
            markersize=5, elinewidth=0.8, alpha=0.85, zorder=4 if number in named else 3,
        )  # fmt: skip


def _scale(axes: Any, x: np.ndarray) -> None:
    if x.min() > 0 and x.max() / x.min() > _WIDE:
        draw_in_decades(axes.xaxis)
    else:
        axes.set_xlim(left=0)


def _finish(
    figure: Any,
    panels: Sequence[tuple[Any, np.ndarray]],
    y: np.ndarray,
    labels: Sequence[str],
    named: Mapping[int, str],
) -> None:
    """Write labels right of each panel, once the layout is settled: they are placed by where points lie on paper."""
    figure.text(0.995, 0.005, "blue: baseline; red: above it, real at 95 %", ha="right", va="bottom", fontsize=7,
                color="#5c5c5c")  # fmt: skip
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    room = _LABEL_INCHES / figure.get_figwidth()
    margin = _AXIS_INCHES / figure.get_figwidth()
    width = (0.995 - margin * len(panels)) / len(panels) - room
    for number, (axes, x) in enumerate(panels):
        place = axes.get_position()
        left = margin + number * (width + room + margin)
        axes.set_position((left, place.y0 + 0.01, width, place.height - 0.01))
        label_beside(axes, x, y, labels, named)
