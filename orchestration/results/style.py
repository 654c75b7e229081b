"""The style that all pictures share: colours, fonts, title, file. Matplotlib is imported when something is drawn."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GROUP_COLOURS = {"many": "#3b6fb6", "medium": "#d98e04", "few": "#b8323f"}
LAST, BEST = "#1b1b1b", "#d55e00"
_MEMBER_COLOURS = (
    "#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6a3d", "#8c8c8c",
)  # fmt: skip
_CHARACTERS_PER_INCH = 12  # of a title
_STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.5, "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True,
}  # fmt: skip


@contextmanager
def picture_style() -> Iterator[None]:
    """Draw in this style inside the block; matplotlib's own settings come back after it."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure that belongs to no window system; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG as a whole: a reader sees the old file or the new one. The same figure gives the same bytes."""
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, format="png", metadata={"Software": None})
    os.replace(scratch, path)


def set_figure_title(figure: Any, text: str) -> None:
    """Write what the whole picture shows above its left edge; lines that are wider than it are broken."""
    width = int(_CHARACTERS_PER_INCH * figure.get_figwidth())
    text = "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""])
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, fontweight="bold")


def shorten(name: str) -> str:
    """Cut a name to the length that fits on an axis."""
    return name if len(name) <= 18 else name[:16] + "…"


def member_colour(index: int) -> str:
    """Return the colour of a member: index 0 is the ensemble, its experts follow."""
    return _MEMBER_COLOURS[index % len(_MEMBER_COLOURS)]
