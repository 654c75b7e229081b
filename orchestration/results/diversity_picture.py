"""The picture of a run's diversity: how different its experts are, and how many of them a router asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from orchestration.results.style import LAST, member_colour, new_figure, set_figure_title, shorten
from orchestration.results.tables import CLASS_GROUPS, diversity_of, selection_note


def draw_diversity(found: Mapping[str, Mapping[str, Any]], title: str) -> Any:
    """Draw a row for last and one for best: pairs that disagree, divergence, bias and variance, experts asked."""
    rows = {which: found[which] for which in ("last", "best") if diversity_of(found.get(which, {}))}
    routed = any((evaluation.get("per_image") or {}).get("experts_used") for evaluation in rows.values())
    draw: list[Callable[[Any, Mapping[str, Any]], None]] = [_draw_pairs, _draw_divergence, _draw_bias_variance]
    if routed:
        draw.append(_draw_experts_used)
    figure = new_figure(4.4 * len(draw), 0.5 + 3.4 * len(rows))
    note = selection_note(found.get("best")).split(";")[0]
    set_figure_title(figure, f"{title}\nHow different the experts are" + (f"; {note}" if note else ""))
    for row, (which, evaluation) in enumerate(rows.items()):
        for column, panel in enumerate(draw):
            axes = figure.add_subplot(len(rows), len(draw), row * len(draw) + column + 1)
            panel(axes, evaluation)
            epoch = f"{which}, epoch {evaluation.get('epoch', '?')}: " if column == 0 else ""
            axes.set_title(epoch + axes.get_title(loc="left"))
    return figure


def _draw_pairs(axes: Any, evaluation: Mapping[str, Any]) -> None:
    axes.set_title("two disagree, %")
    diversity = diversity_of(evaluation)
    names = list(diversity["experts"])
    share = np.full((len(names), len(names)), np.nan)
    for pair in diversity["pairs"]:
        a, b = (names.index(name) for name in pair["experts"])
        share[a, b] = share[b, a] = 100 * pair["disagreement"]["all"]
    top = float(np.nanmax(share)) or 1.0  # experts that never disagree still need a scale
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.25 * top)
    for (i, j), value in np.ndenumerate(share):
        if np.isfinite(value):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value > 0.7 * top else "black")

    shown = [shorten(name) for name in names]
    slanted = max(map(len, shown)) > 28 // len(names)
    axes.set_xticks(range(len(names)), shown, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(len(names)), shown)
    axes.grid(visible=False)


def _draw_divergence(axes: Any, evaluation: Mapping[str, Any]) -> None:
    axes.set_title("KL(mean || expert), nats")
    diversity = diversity_of(evaluation)
    bars = {name: (member_colour(1 + k), diversity["divergence"][name]) for k, name in enumerate(diversity["experts"])}
    _group_bars(axes, bars, 1.0)


def _draw_bias_variance(axes: Any, evaluation: Mapping[str, Any]) -> None:
    axes.set_title("bias and variance of the 0-1 loss, %")
    diversity = diversity_of(evaluation)
    keys = {"bias": "#b8323f", "variance": "#3b6fb6", "error": "#8c8c8c"}
    names = {"error": "error of an expert"}
    _group_bars(axes, {names.get(key, key): (colour, diversity[key]) for key, colour in keys.items()}, 100.0)


def _draw_experts_used(axes: Any, evaluation: Mapping[str, Any]) -> None:
    axes.set_title("experts asked per image")
    used = (evaluation.get("per_image") or {}).get("experts_used") or {}
    _group_bars(axes, {"mean": (LAST, used)}, 1.0)
    axes.set_ylim(0, diversity_of(evaluation)["num_experts"])


def _group_bars(axes: Any, bars: Mapping[str, tuple[str, Mapping[str, float | None]]], scale: float) -> None:
    """Draw a bar for every name in every group, all images first; "n/a" where a group has no image."""
    groups = ["all", *CLASS_GROUPS]
    width = 0.8 / len(bars)
    for k, (name, (colour, by_group)) in enumerate(bars.items()):
        x = np.arange(len(groups)) + (k - (len(bars) - 1) / 2) * width
        values = [by_group.get(group) for group in groups]
        heights = [0.0 if value is None else scale * value for value in values]
        axes.bar(x, heights, 0.92 * width, color=colour, label=shorten(name))
    # A missing bar must not look like a value of 0.
    absent = [place for place, group in enumerate(groups) if all(v.get(group) is None for _, v in bars.values())]
    for place in absent:
        axes.annotate("n/a", (place, 0), xytext=(0, 3), textcoords="offset points", ha="center", color="#777777")
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="x", visible=False)
    low, high = axes.get_ylim()
    axes.set_ylim(low, (high or 1.0) * (1.0 + 0.1 * (1 + len(bars) // 4)))  # room for the legend
    if len(bars) > 1:
        axes.legend(loc="upper left", ncols=4, columnspacing=1.0, handlelength=1.0, borderaxespad=0.2)
