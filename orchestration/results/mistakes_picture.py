"""The most confident mistakes of a run's last model: a sheet of test images with what they are and were taken for.

It follows from kept predictions. Of images that are not kept in memory only those shown are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregation.predictions import Predictions
from experts.data.images import FileImages, ImageStore
from experts.data.remarks import shown
from orchestration.results.saved_run import SavedRun
from orchestration.results.style import fonts_for, new_figure, set_figure_title, shorten
from orchestration.storage.predictions import file_of

_COLUMNS, _ROWS = 6, 4
_WIDTH, _SIDE, _ROW, _HEAD = 12.0, 1.88, 2.5, 1.05  # inches: sheet, image, row with its text, what is above the images
_ENSEMBLE = "ensemble"
_FILE_CHARACTERS = 30


def worst_mistakes(kept: Predictions, most: int) -> NDArray[np.int64]:
    """Return the positions of the images that the ensemble is surest of and wrong about, the surest first.

    Args:
        kept: of a split.
        most: of them to return.
    """
    m = kept.names.index(_ENSEMBLE)
    wrong = np.flatnonzero(kept.rank_MN[m] != 0)
    return wrong[np.argsort(-kept.confidence_MN[m, wrong], kind="stable")[:most]]


def draw_mistakes(folder: Path, opened: Callable[[], SavedRun], stage: str, title: str) -> Any:
    """Draw the sheet of one final stage.

    Args:
        folder: evaluation/, or the stage's below it.
        opened: returns the run with its test images; called where there is a mistake alone.
        stage: that the predictions are of; "" where the recipe has one final stage.
        title: of the picture.

    Returns:
        The figure; None where no prediction was kept, nothing was wrong, or scores are no probabilities.

    Raises:
        ValueError: the predictions are of other images than the run's data has, or an image cannot be read.
    """
    path = file_of(folder, "last", "test")
    if not path.is_file():
        return None
    kept = Predictions.read(path, logits=False)
    places = worst_mistakes(kept, _COLUMNS * _ROWS)
    if not len(places):
        return None
    saved = opened()
    if not saved.config.method.gives_probabilities(stage or saved.config.method.final):
        return None
    if not np.array_equal(kept.labels_N, saved.store.labels):
        raise ValueError(f"{path}: its labels are not those of the test images; evaluate the run where its data is")
    names, m = saved.data["class_names"], kept.names.index(_ENSEMBLE)
    texts = []
    for place in places:
        said, sure = names[kept.predicted_MN[m, place]], 100 * float(kept.confidence_MN[m, place])
        lines = [shorten(str(names[kept.labels_N[place]])), f"taken for {shorten(str(said))}, {sure:.1f} %"]
        texts.append("\n".join([*lines, *_file(saved.store, int(place))]))
    # The files' names are known here alone; the fonts of the other pictures were chosen for those of the classes.
    figure = _sheet(_pixels(saved.store, places), texts, fonts_for("".join(texts))[0])
    wrong = int((kept.rank_MN[m] != 0).sum())
    about = f"the surest {len(places)} of {wrong:,} mistakes among {len(kept.labels_N):,} test images"
    set_figure_title(figure, f"{title}\nWhat the ensemble's last model is surest of and wrong about: {about}")
    return figure


def _sheet(pixels: NDArray[np.uint8], texts: Sequence[str], fonts: Sequence[str]) -> Any:
    """Draw images in rows, each with a text above it.

    All are in one panel, whose units are inches: a panel for each takes five times as long to draw.
    """
    height = _HEAD + _ROW * -(-len(texts) // _COLUMNS) - 0.4
    figure = new_figure(_WIDTH, height)
    figure.set_layout_engine("none")
    panel = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    panel.set_axis_off()
    for k, (image, text) in enumerate(zip(pixels, texts, strict=True)):
        left, top = 0.06 + _WIDTH / _COLUMNS * (k % _COLUMNS), _HEAD + _ROW * (k // _COLUMNS)
        edges = (left, left + _SIDE, top + _SIDE, top)
        panel.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=edges)
        panel.text(left, top - 0.05, text, fontsize=7, fontweight="bold", fontfamily=fonts, va="bottom")
    panel.set(xlim=(0, _WIDTH), ylim=(height, 0))
    return figure


def _pixels(store: ImageStore, places: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return images as the network sees them, [n, S, S] grey or [n, S, S, 3]."""
    images = store.read(places) if isinstance(store, FileImages) else store.take(places)
    found: NDArray[np.uint8] = images.permute(0, 2, 3, 1).cpu().numpy()
    return found[..., 0] if found.shape[-1] == 1 else found


def _file(store: ImageStore, place: int) -> list[str]:
    """Return the end of the path of an image's file; nothing for an image that came in an array."""
    if not isinstance(store, FileImages):
        return []
    name = shown(store.files.path(place))
    return [name if len(name) <= _FILE_CHARACTERS else "…" + name[1 - _FILE_CHARACTERS :]]
