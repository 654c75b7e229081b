"""An axis of classes, sorted by falling number of training images, as several pictures have it.

Ten classes get their names on the axis; thousands become a cloud of points with a running mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.results.style import shorten

NAMED_CLASSES = 40
"""The most names that can be read on an axis."""


def group_of(count: int) -> str:
    """Return the group of a class with so many training images."""
    return "many" if count > 100 else "few" if count < 20 else "medium"


def sorted_counts(data: Mapping[str, Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the training images of each class, and the order that sorts the classes by decreasing count."""
    counts = np.asarray(data["counts"], dtype=np.int64)
    return counts, np.argsort(-counts, kind="stable")


def group_borders(counts: NDArray[Any]) -> list[int]:
    """Return the places among the sorted classes where one group ends and the next begins."""
    return [int(n) for n in ((counts > 100).sum(), (counts >= 20).sum()) if 0 < n < len(counts)]


def width_for(num_classes: int) -> float:
    """Return the width of a picture with an axis of classes, in inches."""
    return float(np.clip(3.0 + 0.35 * num_classes, 8.0, 12.0))


def legend_above(axes: Any, handles: Sequence[Any] | None = None) -> None:
    """Write the legend in one row above the axes: bars leave no room inside."""
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)


def name_classes(axes: Any, data: Mapping[str, Any], order: NDArray[Any]) -> None:
    """Label the axis with the names of the classes, or say their order where they are too many."""
    axes.set_xlim(-0.7, len(order) - 0.3)
    names = data.get("class_names") or [str(index) for index in range(len(order))]
    axes.grid(axis="x", visible=False)
    if len(order) <= NAMED_CLASSES:
        labels = [shorten(str(names[index])) for index in order]
        slanted = len(order) > 12 or max(map(len, labels)) > 9
        axes.set_xticks(range(len(order)), labels, rotation=45 if slanted else 0, ha="right" if slanted else "center",
                        rotation_mode="anchor" if slanted else "default")  # fmt: skip
        axes.tick_params(axis="x", length=0)
    else:
        axes.set_xlabel("classes, sorted by falling number of training images")


def running_mean(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Return the centred mean over `width` values: fewer at the ends, NaN left out, NaN where all of them are."""
    # Differences of running sums: one pass, however wide the window is.
    weight = np.isfinite(values).astype(float)
    total = np.concatenate([[0.0], np.cumsum(np.where(weight > 0, values, 0.0))])
    number = np.concatenate([[0.0], np.cumsum(weight)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - width // 2, 0), np.minimum(centre + (width + 1) // 2, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[high] - total[low]) / (number[high] - number[low])
