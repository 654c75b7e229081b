"""Measures of kept predictions beside top-1: a table below the run's, and pictures of confusion and of reliability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.predictions import Predictions, confusion
from orchestration.results.style import GROUP_COLOURS, new_figure, set_figure_title, shorten
from orchestration.results.text import decimals, text_table
from orchestration.storage.files import read_json
from orchestration.storage.predictions import MEASURES, file_of

MOST_CLASSES = 100
"""Classes of which a confusion matrix can be read."""
_ENSEMBLE = "ensemble"


def measures_lines(run_dir: Path, data: Mapping[str, Any], stages: list[str]) -> list[str]:
    """Return a table of what the last model of every final stage says of the test images; [] where none was kept.

    Args:
        run_dir: the run folder.
        data: content of data.json.
        stages: names of the final stages where there are several, else [""].
    """
    rows = []
    for stage in stages:
        found = read_json(run_dir / "evaluation" / stage / MEASURES).get("last", {}).get("test", {}).get(_ENSEMBLE)
        if found is not None:
            worst = found["worst_class"]
            name = str((data.get("class_names") or {})[worst["class"]])
            numbers = [_percent(found[key]) for key in ("top5", "balanced", "macro_f1")]
            images = f"{worst['images']:,} image{'s' if worst['images'] != 1 else ''}"
            rows.append([stage or _ENSEMBLE, *numbers, f"{_percent(worst['accuracy'])} of {images}: {shorten(name)}"])
    if not rows:
        return []
    heads = ["", "top-5", "balanced", "macro-F1", "worst class"]
    return [
        "What else the last model says of the test images, in %",
        *text_table([heads, *rows], left=(0, 4), rule=True),
    ]


def drawings_of_measures(folder: Path, data: Mapping[str, Any], title: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield file names and what draws them, of one final stage; None comes of what was not kept.

    Args:
        folder: evaluation/, or a stage's below it.
        data: content of data.json.
        title: of the pictures.
    """
    yield "confusion.png", lambda: _confusion(folder, data, title)
    yield "reliability.png", lambda: _reliability(folder, title)


def _confusion(folder: Path, data: Mapping[str, Any], title: str) -> Any:
    """Draw the confusion matrix of the last model, classes from frequent to rare; shares of each class's images."""
    counts, path = np.asarray(data.get("counts") or []), file_of(folder, "last", "test")
    if not path.is_file() or not 0 < len(counts) <= MOST_CLASSES:
        return None
    kept, order = Predictions.read(path, logits=False), np.argsort(-counts, kind="stable")
    images = confusion(kept, _ENSEMBLE, len(counts))[np.ix_(order, order)]
    size = images.sum(axis=1, keepdims=True)
    share = np.divide(images, size, out=np.full(images.shape, np.nan), where=size > 0)
    side = float(np.clip(2.6 + 0.16 * len(counts), 5.0, 12.0))
    figure = new_figure(side + 1.2, side)
    axes = figure.add_subplot()
    shown = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(shown, ax=axes, shrink=0.7, label="images of the class, %")
    names = [shorten(str(name)) for name in np.asarray(data["class_names"], dtype=object)[order]]
    small = {"fontsize": 7 if len(counts) <= 40 else 4}
    axes.set_xticks(range(len(counts)), names, rotation=90, **small)
    axes.set_yticks(range(len(counts)), names, **small)
    axes.grid(visible=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class, from frequent to rare")
    if len(counts) <= 12:
        for (row, column), value in np.ndenumerate(100 * share):
            if value >= 0.5:
                colour = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    set_figure_title(figure, f"{title}\nWhat the ensemble's last model takes test images for")
    return figure


def _reliability(folder: Path, title: str) -> Any:
    """Draw accuracy over confidence of the last model, and how many images have that confidence."""
    found = read_json(folder / MEASURES).get("last", {}).get("test", {})
    bins = (found.get(_ENSEMBLE) or {}).get("reliability")
    if not bins:
        return None
    images = np.array([one["images"] for one in bins])
    accuracy = np.array([np.nan if one["accuracy"] is None else 100 * one["accuracy"] for one in bins])
    confidence = np.array([np.nan if one["confidence"] is None else 100 * one["confidence"] for one in bins])
    figure = new_figure(8.2, 6.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    edges = 100 * np.arange(len(bins)) / len(bins)
    top.bar(edges, accuracy, 100 / len(bins), align="edge", color=GROUP_COLOURS["many"], alpha=0.8, label="accuracy")
    top.plot([0, 100], [0, 100], color="#777777", linestyle="--", linewidth=1, label="accuracy = confidence")
    top.plot(confidence, accuracy, color="#1b1b1b", marker="o", markersize=3, label="at the mean confidence of a bin")
    top.set_ylim(0, 102)
    top.set_ylabel("top-1, %")
    top.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    bottom.bar(edges, images, 100 / len(bins), align="edge", color="#999999")
    bottom.set_ylabel("images")
    bottom.set_xlabel("confidence, %")
    bottom.set_xlim(0, 100)
    set_figure_title(figure, f"{title}\nConfidence and accuracy of the ensemble's last model on test")
    return figure


def _percent(value: float | None) -> str:
    return decimals(value, 100, 2)
