"""Two pictures: the final stages of a run beside each other by class group, and the numbers tried on validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.results.fitted_table import Chosen
from orchestration.results.style import member_colour, new_figure, set_figure_title, shorten
from orchestration.results.tables import groupings, top1

_WIDTH = 0.84  # of all bars of a group together; groups are 1 apart
_COLUMNS = 3  # of panels
_LOW = 14  # %; a lower bar has no room for its number


def draw_finals(finals: Mapping[str, Mapping[str, Mapping[str, Any]]], data: Mapping[str, Any], title: str) -> Any:
    """Draw a bar for each final stage in every group of classes, a panel for each rule that groups them.

    Args:
        finals: evaluations by stage, "last" and "best".
        data: as in `data.json`.
        title: of the picture.
    """
    everything = [evaluation for evaluations in finals.values() for evaluation in evaluations.values()]
    rules = groupings(data, everything)
    figure = new_figure(1.0 + 6.4 * len(rules), 4.8)
    set_figure_title(
        figure,
        f"{title}\nFinal stages: top-1 of the ensemble, %; bars: last model, diamonds: best model where it differs",
    )
    for place, (rule, headings) in enumerate(rules, 1):
        axes = figure.add_subplot(1, len(rules), place)
        axes.set_title(f"classes grouped by {rule}")
        _draw_bars(axes, finals, list(headings))
        axes.set_xticks(range(len(headings)), [_two_lines(heading) for heading in headings.values()])
        axes.set_ylim(0, 105)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
        if place == 1:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=8, borderaxespad=0)
    return figure


def _draw_bars(axes: Any, finals: Mapping[str, Mapping[str, Mapping[str, Any]]], keys: Sequence[str]) -> None:
    wide = _WIDTH / len(finals)
    for number, (stage, evaluations) in enumerate(finals.items()):
        x = np.arange(len(keys)) + (number - (len(finals) - 1) / 2) * wide
        last, best = (_accuracies(evaluations.get(which) or {}, keys) for which in ("last", "best"))
        colour = member_colour(1 + number)
        shown = np.where(np.isfinite(last), last, best)
        axes.bar(x, shown, 0.92 * wide, color=colour, label=shorten(stage))
        other = np.isfinite(best) & (best != shown)
        axes.scatter(
            x[other], best[other], marker="D", s=18, color=colour, edgecolors="white", linewidths=0.7, zorder=3
        )
        for place, value in zip(x, shown, strict=True):
            if np.isfinite(value):
                _write_number(axes, place, value)


def _write_number(axes: Any, x: float, value: float) -> None:
    """Write an accuracy upright into the foot of its bar, or above a bar that is too low for it."""
    y, colour = (1.5, "white") if value > _LOW else (value + 1.5, "#444444")
    axes.text(x, y, f"{value:.1f}", color=colour, fontsize=7, rotation=90, ha="center", va="bottom")


def _accuracies(evaluation: Mapping[str, Any], keys: Sequence[str]) -> NDArray[np.float64]:
    """Return top-1 in % by group; NaN where a group is empty."""
    values = [top1(evaluation, key) for key in keys]
    return np.array([np.nan if value is None else 100 * value for value in values])


def _two_lines(heading: str) -> str:
    name, _, rule = heading.partition(" ")
    return f"{name}\n{rule}"


def draw_tried(chosen: Sequence[Chosen], title: str) -> Any:
    """Draw accuracy on the validation split against the numbers tried, a panel for each number that was chosen.

    Args:
        chosen: as `fitted_table.choices` returns them; those that were not chosen on a split are left out.
        title: of the picture.
    """
    shown = [one for one in chosen if one.tried]
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(max(5.6 * columns, 7.5), 0.8 + 3.4 * rows)
    set_figure_title(figure, f"{title}\nNumbers chosen on validation: mean of per-class accuracies, %")
    for place, one in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        x, y = np.array(sorted(one.tried)).T
        axes.plot(x, 100 * y, color=member_colour(1), marker="o", markersize=3)
        best = dict(one.tried)[one.value]
        axes.scatter([one.value], [100 * best], s=60, color=member_colour(2), zorder=3, label=f"chosen: {one.value:g}")
        axes.axvline(
            one.published, color="#777777", linewidth=0.9, linestyle="--", label=f"published: {one.published:g}"
        )
        axes.set_title(f"stage {one.stage}, on {one.split}")
        axes.set_xlabel(one.key)
        axes.legend(loc="best")
    return figure
