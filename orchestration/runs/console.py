"""Show a run while it trains: a live view on a terminal, one plain line per interval anywhere else.

    epoch 3/60  step 57/3000 (2%)  eta 0:12:40  loss 3.21  lr 0.1  912 images/s  ldam 2.9 2.7 2.8

A term that every expert has is written once, then its values in the experts' order. The view is a courtesy: an error
in it (a closed pipe, a terminal of no width) is swallowed, and training goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from experts.data.names import visible
from orchestration.config.messages import show
from orchestration.results.tables import CLASS_GROUPS, shown_members

_FIRST = ("loss", "lr", "images/s")
_LINE_LENGTH = 160  # characters of a progress line; terms that do not fit are left out
_PACE_S = 30.0  # the ETA is based on steps of this many last seconds


class Console:
    """Shows progress and messages on one stream; never raises.

    Args:
        interval_s: seconds between plain lines. A terminal is refreshed at most four times per second.
        stream: a terminal gets the live view, a dumb one and anything else plain lines without colour codes.
        label: begins every line. Stages that train side by side have one each, and plain lines even on a terminal.
    """

    def __init__(self, *, interval_s: float = 10.0, stream: TextIO | None = None, label: str = "") -> None:
        self._stream = sys.stderr if stream is None else stream
        self._label = label
        self._interval_s = interval_s
        self._pace = _Pace()
        self._line_at = -math.inf
        self._moment = (0, 0, 0, 0)
        self._values: dict[str, float] = {}
        self._evaluation: dict[str, Any] = {}
        self._live: Any = None
        self._terminal = False
        with contextlib.suppress(Exception):
            self._terminal = not label and self._stream.isatty() and os.environ.get("TERM") != "dumb"

    def labelled(self, label: str) -> Console:
        """Return a console on the same stream for one of several stages that train side by side."""
        return Console(interval_s=self._interval_s, stream=self._stream, label=f"{label}: ")

    def step(self, epoch: int, epochs: int, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        """Show how far training is.

        Args:
            epoch: counted from 1.
            epochs: of the stage.
            step: optimiser steps done.
            total_steps: steps to do.
            values: `loss`, `lr`, `images/s` and the terms of the loss, those that are known.
        """
        with contextlib.suppress(Exception):
            self._pace.note(step)
            self._moment, self._values = (epoch, epochs, step, total_steps), dict(values)
            if self._terminal:
                self._draw()
            elif time.monotonic() - self._line_at >= self._interval_s or step == total_steps:
                self._line_at = time.monotonic()
                self._write(self._progress_line())

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """Show an evaluation, in the form of `evaluation/*.json`."""
        with contextlib.suppress(Exception):
            self._evaluation = dict(result)
            if self._terminal:
                self._draw()
            self._write(evaluation_line(result))

    def message(self, text: str) -> None:
        """Show a line of text; on a terminal it stays above the live view."""
        with contextlib.suppress(Exception):
            self._write(text)

    def close(self) -> None:
        """Leave the last view where it is and release the terminal. Closing twice does nothing."""
        live, self._live = self._live, None
        with contextlib.suppress(Exception):
            if live is not None:
                live.stop()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, text: str) -> None:
        text = self._label + text
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(visible(text, keep="\n")))
            return
        show(text, self._stream)

    def _progress_line(self) -> str:
        epoch, epochs, step, total = self._moment
        share = f" ({100 * step / total:.0f}%)" if total else ""
        parts = [f"epoch {epoch}/{epochs}", f"step {step}/{total}{share}", f"eta {self._pace.eta(total)}"]
        parts += [_value(name, self._values[name]) for name in _FIRST if name in self._values]
        return _fit("  ".join(parts), self._short_terms(), _LINE_LENGTH - len(self._label))

    def _short_terms(self) -> list[str]:
        """Return each term with its values, those of all experts where it has several."""
        terms: dict[str, list[str]] = {}
        for name, value in self._values.items():
            if name not in _FIRST:
                term, _, owner = name.rpartition("/")
                terms.setdefault(term or owner, []).append(f"{value:.4g}")
        return [" ".join([term, *values]) for term, values in terms.items()]

    def _draw(self) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        if self._live is None:
            console = RichConsole(file=self._stream)
            # Drawn by us and not from a thread of Rich: an error must stay within the `suppress` of our callers.
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
            self._drawn_at = -math.inf
        now = time.monotonic()
        if now - self._drawn_at >= 0.25 or self._moment[2] == self._moment[3]:
            self._drawn_at = now
            self._live.update(self._view(), refresh=True)

    def _view(self) -> Any:
        from rich.console import Group
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        epoch, epochs, step, total = self._moment
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(f"epoch {epoch}/{epochs}", style="bold")
        head.append(f"  step {step:,}/{total:,}  eta ")
        head.append(self._pace.eta(total), style="bold")
        bar = Padding(ProgressBar(total=max(total, 1), completed=step), 0)  # padded, as a bar alone ends no line
        parts: list[Any] = [head, bar]
        first = [_value(name, self._values[name]) for name in _FIRST if name in self._values]
        parts.append(Text("  ".join(first), style="cyan", no_wrap=True, overflow="ellipsis"))
        if terms := self._terms():
            parts.append(terms)
        if self._evaluation:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            table.add_column(f"{self._evaluation.get('split', '')} top-1 %", no_wrap=True, style="dim")
            for group in ("all", *CLASS_GROUPS):
                table.add_column(group, justify="right", no_wrap=True)
            for member in shown_members(_accuracies(self._evaluation)):
                top1 = self._evaluation["members"][member]["top1"]
                cells = [_percent(top1.get(group)) for group in ("all", *CLASS_GROUPS)]
                table.add_row(member, *cells, style="bold" if member == "ensemble" else "")
            parts.append(table)
        return Group(*parts)

    def _terms(self) -> Any:
        """Return the terms as a small table, a column per term and a row per expert; None when there are none."""
        from rich.table import Table

        values = {name: value for name, value in self._values.items() if name not in _FIRST}
        if not values:
            return None
        rows: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            term, _, owner = name.rpartition("/")
            rows.setdefault(owner if term else "", {})[term or owner] = value
        names = list(dict.fromkeys(term for row in rows.values() for term in row))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("loss terms", no_wrap=True, style="dim")
        for term in names:
            table.add_column(term, justify="right", no_wrap=True)
        for owner, row in rows.items():
            table.add_row(owner, *(f"{row[term]:.4g}" if term in row else "" for term in names))
        return table


def evaluation_line(result: Mapping[str, Any]) -> str:
    """Return an evaluation as one line: every group of the ensemble, all images of each expert."""
    shown = [f"{result.get('split', '')} top-1 %, epoch {result.get('epoch', '?')}:"]
    for member in shown_members(_accuracies(result)):
        top1 = result["members"][member]["top1"]
        if member == "ensemble":
            shown += [f"{group} {_percent(top1.get(group))}" for group in ("all", *CLASS_GROUPS)]
        else:
            shown.append(f"{member} {_percent(top1.get('all'))}")
    return "  ".join(shown)


def _accuracies(result: Mapping[str, Any]) -> dict[str, Any]:
    return {member: found["top1"] for member, found in result["members"].items()}


def _fit(line: str, terms: Sequence[str], width: int) -> str:
    """Return the line with as many terms as it has room for, and the number of those left out."""
    text, shown = "  ".join([line, *terms]), len(terms)
    while shown and len(text) > width:
        shown -= 1
        text = "  ".join([line, *terms[:shown], f"(+{len(terms) - shown} more)"])
    return text


class _Pace:
    """Steps per second over the last half minute."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, int]] = []  # when each was reported

    def note(self, step: int) -> None:
        now = time.monotonic()
        if self._steps and step < self._steps[-1][1]:  # a new stage, or back to a checkpoint
            self._steps.clear()
        self._steps.append((now, step))
        while len(self._steps) > 2 and now - self._steps[1][0] > _PACE_S:
            self._steps.pop(0)

    def eta(self, total: int) -> str:
        """Return the time to go as h:mm:ss; "?" before two steps were reported."""
        if not self._steps:
            return "?"
        (start, first), (end, last) = self._steps[0], self._steps[-1]
        if last >= total:
            return "0:00:00"
        if last == first or end == start:
            return "?"
        minutes, seconds = divmod(round((total - last) * (end - start) / (last - first)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


def _value(name: str, value: float) -> str:
    if name == "images/s":
        return f"{value:,.0f} images/s"
    return f"{name} {value:.4g}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}"
