"""The accuracy of several weightings of the experts on several test distributions, as one table and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.results import tables
from orchestration.results.style import draw_to, member_colour, new_figure, set_figure_title
from orchestration.results.tables import selection_note
from orchestration.results.text import decimals, text_table

ALL_AND_GROUPS = ("all", *tables.CLASS_GROUPS)
WEIGHTINGS = ("as trained", "uniform", "test-time", "given", "known prior", "oracle")
"""All weightings in the order of the table. An evaluation has some of them, and each expert alone."""
_COLOURS = {
    "as trained": "#8c8c8c", "uniform": "#1b1b1b", "test-time": "#d55e00", "given": "#cc79a7",
    "known prior": "#0072b2", "oracle": "#009e73",
}  # fmt: skip


def distributions_table(result: Mapping[str, Any]) -> str:
    """Return weights and top-1 by group for every distribution and weighting, a legend, and warnings.

    Args:
        result: as `orchestration.results.label_shift` measures it.

    Returns:
        Lines of text, the last without a newline.
    """
    sizes = result.get("group_sizes") or {}
    heads = ["all", *(f"{group} [{sizes[group]}]" if group in sizes else group for group in ALL_AND_GROUPS[1:])]
    rows = [["distribution", "images", "weighting", "weights", *heads]]
    for name, found in result["distributions"].items():
        first = [name, f"{found['num_images']:,}"]
        for member in (rule for rule in WEIGHTINGS if rule in found["members"]):
            weights = found["weights"].get(member)
            shown = " ".join(f"{weight:.2f}" for weight in weights) if weights else ""
            top1 = found["members"][member]["top1"]
            rows.append([*first, member, shown, *(decimals(top1[group], 100.0, 2) for group in ALL_AND_GROUPS)])
            first = ["", ""]  # a distribution is named in its first row only

    when = [f"{key} {result[key]}" for key in ("stage", "epoch", "step") if result.get(key) is not None]
    note = selection_note(result) if result["weights"] == "best" else ""
    lines = [
        f"{result['method']}, {result['dataset']}, run {result['run']}, model {result['weights']}"
        f"{' (' + ', '.join(when) + ')' if when else ''}, measured on {result['split']}",
        *([note] if note else []),
        f"experts: {', '.join(result['experts'])}",
        "",
        "Top-1 accuracy in %, classes grouped by number of training images",
        *text_table(rows, left=(0, 2, 3), rule=True),
        "",
        *_legend(result),
        *_warnings(result),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _legend(result: Mapping[str, Any]) -> list[str]:
    """Explain the weightings, with the settings that they were learnt with."""
    settings, views = result.get("settings"), result.get("views")
    trained = result["trained_for"]
    trained_for = trained[0] if len(set(trained)) == 1 else ", ".join(trained)
    known = (
        f"known prior: logits corrected for the test set's class counts, which must be known; experts taken to be "
        f"trained for: {trained_for}"
        if trained
        else "known prior: n/a, it corrects probabilities, and this run's loss trains none"
    )
    lines = [
        "all: mean over the images, so it follows the distribution; many, medium, few: means over their classes",
        f"as trained: the recipe's own rule, {result['aggregator']}; uniform: mean of the experts' logits",
    ]
    if settings and views:
        crop = views["random_resized_crop"]
        lines += [
            f"test-time: learnt from the images without labels, at most {settings['epochs']} passes, batch "
            f"{settings['batch_size']}, lr {settings['lr']:g}, weight decay {settings['weight_decay']:g}, entropy "
            f"{settings['entropy']:g}, seed {settings['seed']};",
            f"  views: crop {'of ' + str(crop) if crop else 'from a border of ' + str(views['crop_padding'])}, mirror "
            f"{views['horizontal_flip']:g}, colour {views['jitter']:g}, grey {views['grey']:g}, blur {views['blur']:g}",
        ]
    return [
        *lines,
        known,
        "oracle: the best weights, found WITH the labels of these images: an upper bound, not a result",
    ]


def _warnings(result: Mapping[str, Any]) -> list[str]:
    """Return a line for each distribution left out, each fallback of the learning, and each group without images."""
    # A warning may hold for several distributions, and is shown once.
    lines = [f"{name}: n/a, {why}" for name, why in (result.get("skipped") or {}).items()]
    warnings: dict[str, None] = {}
    for name, found in result["distributions"].items():
        learning = found.get("learning") or {}
        warnings |= dict.fromkeys(learning.get("warnings") or ())
        if learning.get("fallback"):
            lines.append(f"{name}: {learning['fallback']}")
        if learning.get("stopped_early"):
            lines.append(f"{name}: learning ended after pass {learning['passes']}, a weight was too small")
        empty = sum(count == 0 for count in found["test_counts"])
        if empty:
            classes = "1 class has" if empty == 1 else f"{empty} classes have"
            lines.append(f"{name}: {classes} no test image; groups are means over the others")
    return [*lines, *(f"warning: {text}" for text in warnings)]


def draw_distributions(path: Path, result: Mapping[str, Any]) -> str:
    """Draw accuracy of all weightings by group, and the weights, over the distributions.

    Args:
        path: of the picture.
        result: as for `distributions_table`.

    Returns:
        The path of the picture, or why there is none.
    """
    problems: list[str] = []
    return f"drawn as {path}" if draw_to(path, lambda: _figure(result), problems.append) else problems[0]


def _figure(result: Mapping[str, Any]) -> Any:
    found = result["distributions"]
    learnt = [rule for rule in ("test-time", "given", "oracle") if any(rule in f["weights"] for f in found.values())]
    figure = new_figure(13.5, 7.4)
    set_figure_title(
        figure,
        f"{result['method']}, {result['dataset']}, run {result['run']}, model {result['weights']}\n"
        f"Test distributions from forward (as in training) to backward, on {result['split']}",
    )

    # Above, all images and the weights, each half as wide as the picture; below, a third for each group.
    cells = figure.add_gridspec(2, 6)
    panels = {"all": cells[0, 0:3], "many": cells[1, 0:2], "medium": cells[1, 2:4], "few": cells[1, 4:6]}
    for group, place in panels.items():
        _draw_accuracy(figure.add_subplot(place), found, group)
    _draw_weights(figure.add_subplot(cells[0, 3:6]), found, result["experts"], learnt)
    return figure


def _draw_accuracy(axes: Any, found: Mapping[str, Any], group: str) -> None:
    axes.set_title(f"top-1, {group}, %")
    for rule in WEIGHTINGS:
        y = [(f["members"].get(rule) or {"top1": {}})["top1"].get(group) for f in found.values()]
        values = np.array([np.nan if value is None else 100 * value for value in y])
        if np.isfinite(values).any():
            style = {"oracle": "--", "known prior": ":", "as trained": "-."}.get(rule, "-")
            axes.plot(range(len(values)), values, style, marker="o", markersize=3, color=_COLOURS[rule], label=rule)
    if not axes.lines:
        axes.text(0.5, 0.5, "n/a", transform=axes.transAxes, ha="center")
    elif group == "all":
        axes.legend()
    _name_distributions(axes, found)
    # Room above the lines, but no accuracy above 100 %.
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))


def _draw_weights(axes: Any, found: Mapping[str, Any], experts: Sequence[str], rules: Sequence[str]) -> None:
    axes.set_title("weights: " + ", ".join(f"{rule} {'dashed' if rule == 'oracle' else 'solid'}" for rule in rules))
    for k, expert in enumerate(experts):
        for rule in rules:
            values = [f["weights"][rule][k] if rule in f["weights"] else np.nan for f in found.values()]
            colour, style = member_colour(1 + k), "--" if rule == "oracle" else "-"
            # Colours stand for experts, line styles for rules: one entry per expert is enough.
            label = None if rule == "oracle" and len(rules) > 1 else expert
            axes.plot(range(len(values)), values, style, marker="o", markersize=3, color=colour, label=label)
    axes.axhline(1 / len(experts), color="#777777", linewidth=0.6, linestyle=":")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(ncols=1 + len(experts) // 5)
    _name_distributions(axes, found)


def _name_distributions(axes: Any, found: Mapping[str, Any]) -> None:
    axes.set_xlim(-0.4, len(found) - 0.6)
    axes.set_xticks(range(len(found)), list(found), rotation=35, ha="right", rotation_mode="anchor")
