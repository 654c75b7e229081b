"""The runs of a sweep as one table and one picture: top-1 of the ensemble by class group against the value varied."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.results.classifier_table import Entry, classifier_table
from orchestration.results.style import GROUP_COLOURS, draw_in_decades, draw_to, new_figure, set_figure_title, shorten
from orchestration.results.tables import CLASS_GROUPS
from orchestration.results.text import decimals, text_table

_RULES = {"by number of training images": "", "by index": "_by_index"}
"""A rule for grouping classes, in words, and the suffix of its keys in an evaluation."""
_WIDE = 30  # values that span more than this factor are drawn on a log axis


def sweep_table(result: Mapping[str, Any]) -> str:
    """Return the numbers of all runs, the stages that were trained once for several, and the runs that failed.

    Args:
        result: as in sweep.json.

    Returns:
        Lines of text, the last without a newline.
    """
    runs, finals = result["runs"], _final_stages(result)
    moments = sorted({f"stage {r['stage']}, epoch {r['epoch']}, on {r['split']}" for r in runs if "top1" in r})
    where = f" ({'; '.join(moments)})" if moments and not finals else ""
    models = f"last model of each run{where}" if not finals else "last model of every final stage of each run"
    spread = "" if finals and result["key"] == "seed" else "one run per value: no spread"
    lines = [
        f"{result['method']}, {result['dataset']}: {result['key']}",
        "; ".join(part for part in (models, f"{_seed(result)}{spread}") if part),
        *(["", *_classifier_lines(result)] if finals else _value_lines(result)),
    ]

    # One line per stage and donor, however many runs took it over.
    taken: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for stage, donor in run["stages_taken"].items():
            taken.setdefault((stage, donor), []).append(run["run"])
    lines += [""] if taken else []
    for (stage, donor), takers in taken.items():
        lines.append(f"stage {stage}: trained once, in {donor}, and taken over by {', '.join(takers)}")

    for run in runs:
        if run["status"] != "finished":
            why = f": {run['problem']}" if run["problem"] else ""
            lines.append(f"{run['value']}: {run['status']}{why}")
    return "\n".join(line.rstrip() for line in lines)


def _value_lines(result: Mapping[str, Any]) -> list[str]:
    """Return a row per value: top-1 by group of the run's one result."""
    lines = []
    for rule, suffix in _rules(result).items():
        lines += ["", f"Top-1 accuracy of the ensemble in %, classes grouped {rule}"]
        keys = ["all", *(group + suffix for group in CLASS_GROUPS)]
        rows = [[result["key"].rsplit(".", 1)[-1], *(_heading(key, result) for key in keys), "run"]]
        for run in result["runs"]:
            top1 = run.get("top1") or {}
            rows.append([run["value"], *(decimals(top1.get(key), 100.0, 2) for key in keys), run["run"]])
        lines += text_table(rows, rule=True)
    return lines


def _final_stages(result: Mapping[str, Any]) -> list[str]:
    """Return the final stages of the runs, where they have several."""
    return list(dict.fromkeys(stage for run in result["runs"] for stage in run.get("finals") or {}))


def _by_stage(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a run's accuracies by final stage, also where it has one alone; {} where it is not finished."""
    return run.get("finals") or ({run["stage"]: run["top1"]} if "top1" in run else {})


def _classifier_lines(result: Mapping[str, Any]) -> list[str]:
    """Return a row per loss with all its classifiers; runs that differ by their seed share a row."""
    entries = []
    for run in result["runs"]:
        # Where neither the loss nor the seed varies, the value says what the row is.
        loss = (
            run["loss"] if result["key"] in ("method", "seed") else f"{result['key'].rsplit('.', 1)[-1]} {run['value']}"
        )
        entries.append(Entry(loss, run["seed"], _by_stage(run)))
    return classifier_table(entries, result["group_sizes"])


def _seed(result: Mapping[str, Any]) -> str:
    return "" if result["key"] == "seed" else f"seed {result['seed']}, "


def _rules(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the rules that group the classes here, each with the suffix of its keys."""
    has_index = any(value is not None for run in result["runs"] for value in _by_index(run).values())
    return {rule: suffix for rule, suffix in _RULES.items() if not suffix or has_index}


def _by_index(run: Mapping[str, Any]) -> dict[str, float | None]:
    top1 = run.get("top1") or {}
    return {group: top1.get(f"{group}_by_index") for group in CLASS_GROUPS}


def _heading(key: str, result: Mapping[str, Any]) -> str:
    sizes, name = result["group_sizes"], key.removesuffix("_by_index")
    return f"{name} [{sizes[key]}]" if key in sizes else name


def draw_sweep(folder: Path, result: Mapping[str, Any]) -> str:
    """Draw sweep.png: a line for every group, a panel for every rule that groups the classes.

    Returns:
        The name of the file, or why there is none.
    """
    shown = [run for run in result["runs"] if "top1" in run]
    if not shown:
        return "no picture, since no run is finished"
    path, problems = folder / "sweep.png", list[str]()
    return path.name if draw_to(path, lambda: _figure(result, shown), problems.append) else problems[0]


def _figure(result: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Any:
    rules, finals = _rules(result), _final_stages(result)
    rows = finals or [""]
    figure = new_figure(0.6 + 6.6 * len(rules), 0.8 + 3.8 * len(rows))
    set_figure_title(
        figure,
        f"{result['method']}, {result['dataset']}: top-1 of the ensemble against {result['key']}\n"
        f"last model, {_seed(result)}one run per value",
    )

    # Numbers lie on the axis where they belong, in rising order; other values stand side by side as they were given.
    numbers = [_as_number(run["value"]) for run in runs]
    on_axis = all(value is not None for value in numbers)
    order = np.argsort([float(value or 0) for value in numbers], kind="stable") if on_axis else np.arange(len(runs))
    x = np.array([numbers[i] if on_axis else i for i in order], dtype=float)

    for place, (stage, (rule, suffix)) in enumerate(itertools.product(rows, rules.items()), 1):
        axes = figure.add_subplot(len(rows), len(rules), place)
        axes.set_title(f"{f'{stage}: ' if stage else ''}classes grouped {rule}, top-1 %")
        top1 = [_by_stage(runs[i]).get(stage, {}) if stage else runs[i]["top1"] for i in order]
        for group, colour in {"all": "#1b1b1b", **GROUP_COLOURS}.items():
            key = group if group == "all" else group + suffix
            y = np.array([np.nan if (v := one.get(key)) is None else 100 * v for one in top1])
            if np.isfinite(y).any():
                strong = group == "all"
                line = {"linewidth": 2.4 if strong else 1.5} if on_axis else {"linestyle": ""}  # words have no between
                axes.plot(x, y, color=colour, marker="o", markersize=4 if on_axis else 8, **line,
                          zorder=3 if strong else 2, label=_heading(key, result))  # fmt: skip
        axes.set_xlabel(result["key"])
        if not on_axis:
            words = [shorten(runs[i]["value"]) for i in order]
            turned = sum(map(len, words)) > 40  # as many as one below the other would fit
            axes.set_xticks(x, words, rotation=20 if turned else 0, ha="right" if turned else "center")
            axes.set_xlim(-0.5, len(x) - 0.5)
            axes.set_ylim(0, 100)
            axes.grid(axis="x")
        elif x.min() > 0 and x.max() / x.min() > _WIDE:
            draw_in_decades(axes.xaxis)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
