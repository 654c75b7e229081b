"""The style that all pictures share: colours, fonts, title, file. Matplotlib is imported when something is drawn.

A picture shows results that are safe already: whatever fails in it costs that picture and one line (`draw_to`).
"""

from __future__ import annotations

import logging
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experts.data.names import visible
from orchestration.config.messages import in_one_line

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
    "text.parse_math": False,  # a name with a $ in it is no formula
    "lines.linewidth": 1.5, "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True,
}  # fmt: skip


def draw_to(path: Path, draw: Callable[[], Any], say: Callable[[str], None], names: str = "") -> bool:
    """Draw a figure in this style and write it as a PNG.

    Args:
        path: of the picture.
        draw: returns a figure, or None where there is nothing to show.
        say: takes a line if that fails.
        names: that are drawn as their owners wrote them; fonts are chosen for their characters.

    Returns:
        Whether there is a picture.
    """
    try:
        with picture_style(names):
            figure = draw()
            if figure is None:
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            save_figure(figure, path)
    except Exception as problem:  # of Matplotlib, of a font, of a full disk
        say(f"{path.parent.name}/{path.name} was not drawn: {in_one_line(problem)}")
        return False
    return True


@contextmanager
def picture_style(names: str = "") -> Iterator[None]:
    """Draw in this style inside the block, with fonts for the names; matplotlib's own settings come back after it."""
    import matplotlib

    with matplotlib.rc_context(_STYLE | {"font.family": fonts_for(names)[0]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # `fonts_for` says so, once
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font of another script may lack bold
        yield


_PLACEHOLDERS = "Last Resort"
"""Beginning of the name of a font of Matplotlib that has a box for every character, and so a picture of none."""


def fonts_for(names: str) -> tuple[list[str], str]:
    """Return the families of fonts to draw names with, and the characters that no font of this machine has."""
    from matplotlib import font_manager

    usual = font_manager.FontProperties(family="DejaVu Sans")  # Matplotlib brings it
    families = ["DejaVu Sans"]
    missing = {c for c in names if c.isprintable()} - _characters(font_manager.findfont(usual))
    for font in font_manager.fontManager.ttflist if missing else ():
        if font.name.startswith(_PLACEHOLDERS) or font.name in families:
            continue
        if found := missing & _characters(font.fname):
            families.append(font.name)
            missing -= found
    return families, "".join(sorted(missing))


def _characters(font_file: str) -> set[str]:
    from matplotlib.font_manager import get_font

    try:
        return {chr(code) for code in get_font(font_file).get_charmap()}
    except (OSError, RuntimeError):  # a font file that is damaged, or not for us to read
        return set()


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
    # Not `savefig`, which draws everything on trial first: a fourteenth of the time of a report, for the same bytes.
    figure.canvas.print_png(scratch, metadata={"Software": None})
    os.replace(scratch, path)


def set_figure_title(figure: Any, text: str) -> None:
    """Write what the whole picture shows above its left edge; lines that are wider than it are broken."""
    width = int(_CHARACTERS_PER_INCH * figure.get_figwidth())
    text = visible(text, keep="\n")
    text = "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""])
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, fontweight="bold")


def draw_in_decades(axis: Any) -> None:
    """Give an axis a logarithmic scale, with numbers as they are: Matplotlib's own labels are formulas."""
    (axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale)("log")
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def shorten(name: str) -> str:
    """Cut a name to the length that fits on an axis; what is no character is shown by its number."""
    name = visible(name)
    return name if len(name) <= 18 else name[:16] + "…"


def member_colour(index: int) -> str:
    """Return the colour of a member: index 0 is the ensemble, its experts follow."""
    return _MEMBER_COLOURS[index % len(_MEMBER_COLOURS)]
