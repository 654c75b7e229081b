"""Pictures of what happened over epochs, and of accuracy on other test distributions: a small panel for each row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experts.data.label_shift import parse_distribution
from orchestration.reports.plots import ALL, BASE, colour_of, grid_of, short_label, title
from orchestration.reports.records import BY_COUNT, ENSEMBLE, Record
from orchestration.reports.report import Report, Section
from orchestration.reports.rows import Row, stages_to
from orchestration.results.style import new_figure
from orchestration.storage.journal import FILE_NAME

_LOSS = "train/epoch_loss"
_FEWEST_POINTS = 3  # of a curve
_WEIGHTINGS = {"uniform": ALL, "oracle": "#009e73", "known prior": "#56b4e9", "test-time": "#d55e00"}
"""Rules for the experts' weights, with colours, in the order of drawing: what is learnt without labels lies above."""


class Curve(NamedTuple):
    """Mean and standard deviation over seeds, at some epochs."""

    epochs: np.ndarray
    mean: np.ndarray
    sd: np.ndarray


def curves_figures(report: Report, section: Section) -> dict[str, Any]:
    """Return what draws the training loss and the accuracy on the rarest classes and over all, by name of file.

    Journals are read once. A measure that was taken fewer than three times is not there.
    """
    groups = [key for key in ("all", *BY_COUNT) if key in section.measures]
    names = {_LOSS: 1.0, **{f"{section.table.schedule.split}/{ENSEMBLE}/{key}/top1": 100.0 for key in groups}}
    found = {row.label: _curves(row, names) for row in section.table.rows}
    drawers: dict[str, Any] = {}
    if any(_LOSS in own for own in found.values()):
        words = "Training loss over epochs, each on its own scale"
        drawers["curves_loss"] = lambda: _panels(section, found, {_LOSS: BASE}, words, "loss", alike=False)
    tops = {name: colour_of(key) for name, key in zip(list(names)[1:], groups, strict=True)}
    if any(name in own for own in found.values() for name in tops):
        over = f"Top-1 on {section.table.schedule.split} over epochs by group"
        drawers["curves_accuracy"] = lambda: _panels(section, found, tops, over, "top-1, %", alike=True)
    return drawers


def _curves(row: Row, names: Mapping[str, float]) -> dict[str, Curve]:
    """Return the curves of a row, of the seeds that have them."""
    own = [_read(record, names) for record in row.records]
    found = {}
    for name in names:
        series = [one[name] for one in own if len(one.get(name, ())) >= _FEWEST_POINTS]
        shared = sorted(set.intersection(*(set(one) for one in series))) if series else []
        if len(shared) >= _FEWEST_POINTS:
            values = np.array([[one[epoch] for epoch in shared] for one in series])
            sd = values.std(axis=0, ddof=1) if len(series) > 1 else np.zeros(len(shared))
            found[name] = Curve(np.array(shared), values.mean(axis=0), sd)
    return found


def _read(record: Record, names: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Read some names of a run's journal by epoch, counted over the stages that lead to the result."""
    stages = stages_to(record.config, record.final)
    before, start = {}, 0
    for stage in stages:
        before[stage] = start
        start += record.config.method.stages[stage].epochs
    found: dict[str, dict[int, float]] = {}
    for line in _lines(record, names):
        at, value, name = line.get("stage"), line.get("value"), line["name"]
        if at in before and value is not None:
            found.setdefault(name, {})[before[at] + int(line["epoch"])] = names[name] * float(value)
    return found


def _lines(record: Record, names: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Yield lines of the journal with these names. Most are of single steps: they are passed over as text."""
    marks = tuple(f'"name": "{name}"' for name in names)
    try:
        with open(record.folder / FILE_NAME, errors="replace") as file:
            for text in file:
                if any(mark in text for mark in marks):
                    try:
                        yield json.loads(text)
                    except ValueError:  # the last line of a killed writer
                        continue
    except OSError:
        return


def _panels(
    section: Section, found: Mapping[str, Mapping[str, Curve]], shown: Mapping[str, str], words: str, label: str,
    *, alike: bool,
) -> Any:  # fmt: skip
    """Draw a panel for each row, its curves as bands; with `alike` all have one scale."""
    rows = [row for row in section.table.rows if any(name in found[row.label] for name in shown)]
    lines, columns = grid_of(len(rows))
    figure = new_figure(0.8 + 2.3 * columns, 0.9 + 1.65 * lines)
    title(figure, section, f"{words}, mean and standard deviation over seeds")
    panels = figure.subplots(lines, columns, sharex=True, sharey=alike, squeeze=False)
    for axes in panels.ravel()[len(rows) :]:
        axes.set_visible(False)
    for number, (axes, row) in enumerate(zip(panels.ravel(), rows, strict=False)):
        for name, colour in shown.items():
            if (curve := found[row.label].get(name)) is not None:
                low, high = curve.mean - curve.sd, curve.mean + curve.sd
                axes.fill_between(curve.epochs, low, high, color=colour, alpha=0.25, linewidth=0)
                axes.plot(curve.epochs, curve.mean, color=colour, linewidth=1.3)
        axes.set_title(short_label(row.label), fontsize=7.5)
        axes.tick_params(labelsize=7)
        if number >= len(rows) - columns:
            axes.tick_params(labelbottom=True)
        if not alike:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    for axes in panels[:, 0]:
        axes.set_ylabel(label, fontsize=8)
    figure.supxlabel("epoch, counted over the stages", fontsize=8)
    if len(shown) > 1:
        handles = [panels[0, 0].plot([], [], color=colour)[0] for colour in shown.values()]
        names = [name.split("/")[2] for name in shown]
        figure.legend(handles, names, loc="outside right upper")  # beside the title, which may be as wide as the rest
    return figure


# Test distributions


def shift_figure(report: Report, section: Section) -> Any:
    """Draw accuracy over test distributions, forward to backward, by rule for the experts' weights; None without."""
    found = {row.label: shifts_of(row, report.which) for row in section.table.rows}
    rows = [row for row in section.table.rows if found[row.label]]
    if not rows:
        return None
    lines, columns = grid_of(len(rows), 4)
    figure = new_figure(1.4 + 3.4 * columns, 1.3 + 2.6 * lines)
    measured = f"{report.which} model, {section.table.schedule.split} images"
    title(figure, section, f"Top-1 on other distributions by the rule for the experts' weights ({measured})")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in panels.ravel()[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(panels.ravel(), rows, strict=False):
        own = found[row.label]
        names = sorted({name for by_name in own.values() for name in by_name}, key=_shift_of)
        for rule, colour in _WEIGHTINGS.items():
            series = [own.get(rule, {}).get(name, []) for name in names]
            if not any(series):
                continue
            mean = np.array([100 * np.mean(values) if values else np.nan for values in series])
            sd = np.array([100 * np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in series])
            x = np.arange(len(names))
            axes.plot(x, mean, color=colour, marker="o", markersize=3, linestyle="--" if rule == "oracle" else "-",
                      linewidth=2.6 if rule == "uniform" else 1.3,
                      label={"test-time": "learnt (test-time)"}.get(rule, rule))  # fmt: skip
            axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(short_label(row.label))
        axes.set_xticks(np.arange(len(names)), [_short_name(name) for name in names], fontsize=7, rotation=90)
    for axes in panels[:, 0]:
        axes.set_ylabel("top-1, %")
    panels.ravel()[min(len(rows), columns) - 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def shifts_of(row: Row, which: str) -> dict[str, dict[str, list[float]]]:
    """Return accuracies by rule and distribution, one per seed, of the model and split that the report shows."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in row.records:
        # "last" stands in where there is no "best", which is the same model then.
        models = {which} if which in record.models else {which, "last"}
        split = row.models(which)[record.seed].split
        shown = [one for one in record.shifts if one.get("weights") in models and one.get("split") == split]
        seen = set()
        for result in shown:
            for name, one in result["distributions"].items():
                for rule, measured in one.get("members", {}).items():
                    value = (measured.get("top1") or {}).get("all")
                    if value is not None and (name, rule) not in seen:
                        seen.add((name, rule))
                        found.setdefault(rule, {}).setdefault(name, []).append(value)
    return found


def _shift_of(name: str) -> float:
    try:
        return parse_distribution(name).shift
    except ValueError:
        return 0.0


def _short_name(name: str) -> str:
    return {"uniform": "U"}.get(name, name.replace("forward-", "F").replace("backward-", "B"))
