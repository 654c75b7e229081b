"""The pictures of a stage's features: images on a plane before and after, and lengths by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregation.projection import Projection
from orchestration.results.class_axis import (
    NAMED_CLASSES,
    group_borders,
    group_of,
    legend_above,
    name_classes,
    running_mean,
    sorted_counts,
    width_for,
)
from orchestration.results.style import GROUP_COLOURS, LAST, new_figure, set_figure_title, shorten

_BEFORE = "#9a9a9a"
_MARKS = "o^sDvP*X<>"
_PROJECTIONS = {"pca": "two principal components", "tsne": "t-SNE: neighbours stay together, distances mean nothing"}


def draw_features(title: str, result: Mapping[str, Any], planes: Mapping[str, Mapping[str, Projection]]) -> Any:
    """Draw a row per expert with the images before and after a stage, classes in the colours of their groups.

    Args:
        title: of run and stage.
        result: the numbers that are saved.
        planes: by expert, and "before" and "after".
    """
    figure = new_figure(11.5, 1.0 + 4.1 * len(planes))
    set_figure_title(
        figure,
        f"{title}\nFeatures of test images before and after the stage, {_PROJECTIONS[result['projection']]}",
    )
    styles = _styles(result["train_images"])
    labels_N = np.array(result["labels"])
    handles: list[Any] = []
    for row, one in enumerate(result["members"]):
        for column, (moment, found) in enumerate(one["moments"].items()):
            axes = figure.add_subplot(len(planes), 2, 2 * row + column + 1)
            handles = _draw_plane(axes, planes[one["member"]][moment].places_N2, labels_N, result, styles)
            expert = f"{one['member']}, " if len(planes) > 1 else ""
            axes.set_title(f"{expert}{moment}: {100 * found['own_centre']:.0f} % lie nearest to their class's mean")
            if found["variance"] is not None:
                axes.set_xlabel(f"the plane holds {100 * found['variance']:.0f} % of the variance")
    figure.legend(
        handles=handles, loc="outside right upper", title="class (training images)", title_fontsize=8, markerscale=1.6,
        alignment="left",
    )  # fmt: skip
    return figure


def _styles(train_images: Sequence[int]) -> list[tuple[Any, str]]:
    """Return colour and mark of each class: the colour of its group, darker to lighter from frequent to rare."""
    from matplotlib.colors import to_rgb

    groups = [group_of(count) for count in train_images]
    styles = []
    for place, group in enumerate(groups):
        rank, size = groups[:place].count(group), groups.count(group)
        # From darker than the group's colour, through it, to lighter.
        towards = 0.5 if size == 1 else rank / (size - 1)
        base = np.array(to_rgb(GROUP_COLOURS[group]))
        colour = base * (0.62 + 0.38 * min(1, 2 * towards)) + (1 - base) * max(0.0, 2 * towards - 1) * 0.5
        styles.append((tuple(np.clip(colour, 0, 1)), _MARKS[rank % len(_MARKS)]))
    return styles


def _draw_plane(
    axes: Any,
    places_N2: NDArray[np.floating],
    labels_N: NDArray[np.integer],
    result: Mapping[str, Any],
    styles: Sequence[tuple[Any, str]],
) -> list[Any]:
    """Draw the images of all classes, rare ones on top. Return what a legend shows."""
    handles = []
    size = float(np.clip(9000 / max(len(labels_N), 1), 6, 26))
    for place, c in enumerate(result["class_ids"]):
        colour, mark = styles[place]
        name = f"{shorten(result['classes'][place])} ({result['train_images'][place]:,})"
        own = places_N2[labels_N == c]
        handles.append(
            axes.scatter(*own.T, s=size, color=colour, marker=mark, alpha=0.65, linewidths=0, label=name, zorder=2)
        )
    axes.set_xticks([])
    axes.set_yticks([])
    return handles


def draw_norms(title: str, result: Mapping[str, Any], data: Mapping[str, Any]) -> Any:
    """Draw the lengths of the head's weights and of features by class, before and after, a column per expert.

    Args:
        title: of run and stage.
        result: the numbers that are saved.
        data: contents of data.json.
    """
    counts, order = sorted_counts(data)
    members = result["members"]
    figure = new_figure(width_for(len(counts)) if len(members) == 1 else min(5.2 * len(members), 22), 5.6)
    smooth = _smooth(len(counts))
    note = f"; lines: mean over {smooth} neighbouring classes" if len(counts) > NAMED_CLASSES else ""
    set_figure_title(figure, f"{title}\nLengths by class, before and after the stage{note}")
    for column, one in enumerate(members):
        for row, (what, label) in enumerate((("weights", "head's weights"), ("features", "features, mean"))):
            axes = figure.add_subplot(2, len(members), row * len(members) + column + 1)
            _draw_lengths(axes, {moment: own[what] for moment, own in one["norms"].items()}, order)
            if column == 0:
                axes.set_ylabel(f"length of {label}")
            if row == 0:
                axes.set_title(one["member"] if len(members) > 1 else "", pad=20)
                legend_above(axes)
            name_classes(axes, data, order)
            if row == 0:
                axes.tick_params(axis="x", labelbottom=False)
                axes.set_xlabel("")
            for border in group_borders(counts[order]):
                axes.axvline(border - 0.5, color="#999999", linewidth=0.7, linestyle="--")
    return figure


def _smooth(classes: int) -> int:
    return max(5, classes // 25)


def _draw_lengths(axes: Any, lengths: Mapping[str, Sequence[float | None] | None], order: NDArray[Any]) -> None:
    """Draw one line, or a cloud and its running mean, for each moment."""
    for (moment, values), colour in zip(lengths.items(), (_BEFORE, LAST), strict=True):
        if values is None:
            axes.text(0.5, 0.5, "the head has no weights by class", transform=axes.transAxes, ha="center")
            return
        y = np.array([np.nan if value is None else value for value in values])[order]
        x = np.arange(len(y))
        if len(y) <= NAMED_CLASSES:
            axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.2, label=moment)
        else:
            size = float(np.clip(2500 / len(y), 1.5, 10))
            axes.scatter(x, y, s=size, color=colour, alpha=0.4 if len(y) < 1000 else 0.15, linewidths=0)
            axes.plot(x, running_mean(y, _smooth(len(y))), color=colour, linewidth=2, label=moment)
    axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
