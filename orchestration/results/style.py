"""What our pictures have in common: style, colours, an empty figure. Matplotlib is imported when something is drawn."""

from __future__ import annotations

from typing import Any

GROUP_COLOURS = {"many": "#3b6fb6", "medium": "#d98e04", "few": "#b8323f"}
_COLOURS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6a3d", "#8c8c8c")
LAST, BEST = "#1b1b1b", "#d55e00"
_STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.5, "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True,
}  # fmt: skip


class style:
    """Our style while drawing; no window system is touched, and the caller's settings come back."""

    def __enter__(self) -> None:
        import matplotlib

        self._context = matplotlib.rc_context(_STYLE)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def new_figure(width: float, height: float) -> Any:
    """An empty picture, sizes in inches, outside any window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def head_line(figure: Any, text: str) -> None:
    """What the whole picture shows, above its left edge."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, fontweight="bold")


def short(name: str) -> str:
    """A name cut to what fits on an axis."""
    return name if len(name) <= 18 else name[:16] + "…"


def colour_of(index: int) -> str:
    """Of the index-th member: 0 is the ensemble, then its experts."""
    return _COLOURS[index % len(_COLOURS)]
