"""The pictures of a run, made from its folder alone: curves, class counts, accuracy per class, diversity.

An interrupted run gets the pictures that its folder has numbers for. Ten classes get their names on the axis; thousands
become a cloud of points with a running mean.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregation.predictions import images_per_class, wilson_interval
from experts.data.names import visible
from orchestration.results.class_axis import (
    NAMED_CLASSES,
    group_borders,
    group_of,
    legend_above,
    name_classes,
    running_mean,
    sorted_counts,
    width_for,
)
from orchestration.results.diversity_picture import draw_diversity
from orchestration.results.features import draw_stages
from orchestration.results.finals_picture import draw_finals, draw_tried
from orchestration.results.finals_table import distinct
from orchestration.results.fitted_table import choices
from orchestration.results.measures_table import drawings_of_measures
from orchestration.results.mistakes_picture import draw_mistakes
from orchestration.results.regions import draw_regions_if_heads_alone
from orchestration.results.saved_run import SavedRun, open_last
from orchestration.results.style import (
    BEST,
    GROUP_COLOURS,
    LAST,
    draw_in_decades,
    draw_to,
    fonts_for,
    member_colour,
    new_figure,
    set_figure_title,
)
from orchestration.results.tables import CLASS_GROUPS, diversity_of, members, selection_note, shown_members
from orchestration.storage.files import evaluations, final_evaluations, read_config, read_json
from orchestration.storage.journal import Series, series
from orchestration.storage.predictions import file_of

_LEGEND_CHARACTERS = 64  # per line: a wider legend would make its panel narrower


def draw_report(
    run_dir: str | os.PathLike[str], say: Callable[[str], None] = lambda _: None, *, files_known: bool = False
) -> list[Path]:
    """Draw `report/*.png`, as far as the run folder has what they need.

    Where a recipe has several final stages, what belongs to one of them is drawn as `report/<stage>/*.png`.

    Args:
        run_dir: the run folder.
        say: takes one line for every picture that could not be drawn; the others are.
        files_known: as for `orchestration.results.saved_run.open_run`.

    Returns:
        The pictures drawn. Each is replaced as a whole.

    Raises:
        ValueError: a file of the run folder is damaged.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    data, found, config = read_json(run_dir / "data.json"), evaluations(run_dir), read_config(run_dir)
    finals, metrics, title = final_evaluations(run_dir), series(run_dir), _title(run_dir, config, data)
    trained = {stage: own for stage, own in metrics.items() if _has_steps(own)}
    chosen = choices(found, finals)

    drawings: dict[str, Callable[[], Any]] = {
        "curves.png": lambda: _curves(trained, [*finals.values()] or [found], title) if trained else None,
        "class_counts.png": lambda: _class_counts(data, title) if data.get("counts") else None,
        "finals.png": lambda: draw_finals(finals, data, title) if len(finals) > 1 else None,
        "tried.png": lambda: draw_tried(chosen, title) if any(one.tried for one in chosen) else None,
        **_drawings_of_a_result(run_dir / "evaluation", found, data, _with_stage(title, found, finals)),
    }
    for stage, own in finals.items():
        named = _drawings_of_a_result(run_dir / "evaluation" / stage, own, data, _with_stage(title, own, finals))
        drawings |= {f"{stage}/{name}": draw for name, draw in named.items()}
    # Data and model are opened once, by whoever needs them first.
    opened = _once(lambda: open_last(run_dir, files_known=files_known))
    for stage in finals or [""]:
        drawings[f"{stage}/mistakes.png".lstrip("/")] = functools.partial(
            draw_mistakes, run_dir / "evaluation" / stage, opened, stage, f"{title}, stage {stage}" if stage else title
        )
    names = visible("".join([title, *map(str, data.get("class_names") or ())]))
    if drawings and (absent := fonts_for(names)[1]):
        say(f"no font of this machine has {absent[:20]!r}, which pictures show as boxes; install one that has")
    written = [folder / name for name, draw in drawings.items() if draw_to(folder / name, draw, say, names)]

    # Regions and features need the model and the data as well, and bring their own style.
    return written + draw_regions_if_heads_alone(run_dir) + draw_stages(run_dir, opened)


def _once(open_run: Callable[[], SavedRun]) -> Callable[[], SavedRun]:
    """Return a function that opens a run when it is first called, and then returns or raises the same again."""

    @functools.cache
    def found() -> SavedRun | Exception:
        try:
            return open_run()
        except Exception as problem:
            return problem

    def opened() -> SavedRun:
        if isinstance(run := found(), Exception):
            raise run
        return run

    return opened


def _drawings_of_a_result(
    folder: Path, evaluated: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any], title: str
) -> dict[str, Callable[[], Any]]:
    """Return what draws the evaluations of one stage, by file; None comes of what they do not hold."""
    found = distinct(evaluated)
    return {
        "per_class.png": lambda: _per_class(data, found, title, folder) if data.get("counts") and found else None,
        "diversity.png": lambda: draw_diversity(found, title) if any(map(diversity_of, found.values())) else None,
        **dict(drawings_of_measures(folder, data, title)),
    }


def _with_stage(title: str, found: Mapping[str, Mapping[str, Any]], finals: Mapping[str, Any]) -> str:
    """Add the stage to a title where the run has several results."""
    stage = next((evaluation.get("stage") for evaluation in found.values()), None)
    return f"{title}, stage {stage}" if finals and stage else title


def _has_steps(metrics: Mapping[str, Series]) -> bool:
    """Return whether a stage has taken a step; one without has no place on an axis of epochs."""
    return any(one.steps[-1] > 0 for one in metrics.values())


def _title(run_dir: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Return method, number of experts, dataset and run, as far as they are known."""
    method = config.get("method") or {}
    experts = method.get("num_experts")
    words = [str(method.get("name", "")), f"{experts} expert{'s' if experts != 1 else ''}" if experts else ""]
    shown = [word for word in (*words, str(data.get("dataset", ""))) if word]
    return visible(", ".join([*shown, f"run {run_dir.name}"]))


# Curves


def _curves(
    metrics: Mapping[str, Mapping[str, Series]], results: Sequence[Mapping[str, Mapping[str, Any]]], title: str
) -> Any:
    """Draw loss, its terms, learning rate, and accuracy by group; stages follow one another along the epochs.

    Args:
        metrics: the journal of every stage with steps.
        results: the evaluations of the run, or of each final stage; the best of each is marked.
        title: of the picture.
    """
    time = _Timeline(metrics)
    splits = sorted({name.split("/")[0] for _, name in time.names() if name.endswith("/top1")})
    panels: list[tuple[Callable[..., None], tuple[str, ...]]] = [(_draw_loss, ()), (_draw_lr, ())]
    if _terms(time):
        panels.insert(1, (_draw_terms, ()))
    for split in splits:
        panels.append((_draw_groups, (split,)))
        for group in ("all", "few"):  # one expert is the ensemble, whose groups are drawn already
            if len(shown_members(_of_members(time, split, group))) > 1:
                panels.append((_draw_members, (split, group)))

    columns = 2 if len(panels) in (2, 4) else 3
    rows = -(-len(panels) // columns)
    figure = new_figure(4.5 * columns, 0.5 + 3.7 * rows)
    set_figure_title(figure, title)
    # Panels with arguments show evaluations, in which the best one is marked.
    for place, (draw, arguments) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        draw(axes, time, *arguments)
        if arguments:
            marked = [best for found in results if (best := found.get("best")) and best.get("stage") in time.starts]
            for line, best in enumerate(marked):
                _mark_best(axes, time, best, line, f" of {best['stage']}" if len(marked) > 1 else "")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0, 1.02 * max(time.epochs, 1))  # the last marker is seen whole
        for stage, start in list(time.starts.items())[1:]:
            axes.axvline(start, color="#999999", linewidth=0.8, linestyle="--")
            axes.annotate(stage, (start, 1), xycoords=("data", "axes fraction"), fontsize=7, color="#666666",
                          xytext=(3, -8), textcoords="offset points")  # fmt: skip
    return figure


class _Timeline:
    """All stages of a run on one axis of epochs; a step is a fraction of an epoch."""

    def __init__(self, metrics: Mapping[str, Mapping[str, Series]]) -> None:
        self._metrics = metrics
        self.starts: dict[str, float] = {}
        self._steps_per_epoch: dict[str, float] = {}
        self.epochs = 0.0
        for stage, by_name in metrics.items():
            self.starts[stage] = self.epochs
            per_epoch = _steps_per_epoch(by_name.values())
            self._steps_per_epoch[stage] = per_epoch
            self.epochs += max(one.steps[-1] for one in by_name.values()) / per_epoch

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield stage and name of every metric."""
        yield from ((stage, name) for stage, by_name in self._metrics.items() for name in by_name)

    def get(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return epochs and values of a metric over all stages, with a gap (NaN) between stages."""
        x, y = [], []
        for stage, by_name in self._metrics.items():
            if name in by_name:
                x += [self.at(stage, step) for step in by_name[name].steps] + [np.nan]
                y += [*by_name[name].values, np.nan]
        return np.array(x[:-1]), np.array(y[:-1])  # without the gap after the last stage

    def at(self, stage: str, step: int) -> float:
        """Return the place of a step on the axis."""
        return self.starts[stage] + step / self._steps_per_epoch[stage]


def _steps_per_epoch(metrics: Iterable[Series]) -> float:
    """Return the steps per epoch by the last complete epoch, or those so far where no epoch is complete."""
    last: dict[int, int] = {}
    for one in metrics:
        for epoch, step in zip(one.epochs, one.steps, strict=True):
            last[epoch] = max(last.get(epoch, 0), step)
    epochs = sorted(last)
    complete = epochs[:-1] or epochs  # the last epoch may still be under way
    return max(last[complete[-1]] / complete[-1], 1.0)


def _draw_loss(axes: Any, time: _Timeline) -> None:
    axes.set_title("Training loss of the ensemble")
    x, y = time.get("train/loss")
    if len(y):
        axes.plot(*_thin(x, y), color="#b9c9dd", linewidth=0.7, label="every step")
        if len(y) >= 20:
            axes.plot(*_thin(x, running_mean(y, max(5, len(y) // 50))), color="#0b3d77", label="running mean")
        axes.set_ylim(*_robust_limits(y))
        _legend(axes)


def _terms(time: _Timeline) -> dict[str, list[str]]:
    """Return the terms of the loss: name -> members that have it ("" for the whole ensemble)."""
    no_terms = {"loss", "epoch_loss", "lr", "images_per_s"}
    found: dict[str, list[str]] = {}
    for _, name in time.names():
        parts = name.split("/")
        if parts[0] == "train" and parts[1] not in no_terms:
            # train/<term> is of the ensemble, train/<term>/<member> of one member; a term may contain slashes.
            *term, last = parts[1:]
            owner, key = ("", last) if not term else (last, "/".join(term))
            if owner not in found.setdefault(key, []):
                found[key].append(owner)
    return found


def _draw_terms(axes: Any, time: _Timeline) -> None:
    axes.set_title("Terms of the loss")
    styles = ("-", "--", ":", "-.")
    terms = _terms(time)
    for index, (term, owners) in enumerate(terms.items()):
        for owner in owners:
            x, y = time.get(f"train/{term}/{owner}" if owner else f"train/{term}")
            smooth = running_mean(y, max(1, len(y) // 50)) if len(y) >= 100 else y
            axes.plot(*_thin(x, smooth), color=member_colour(owners.index(owner) + 1 if owner else 0),
                      linestyle=styles[index % 4], linewidth=1.2)  # fmt: skip
    _terms_legend(axes, list(terms), sorted({o for owners in terms.values() for o in owners if o}), styles)


def _draw_lr(axes: Any, time: _Timeline) -> None:
    axes.set_title("Learning rate")
    x, y = time.get("train/lr")
    if len(y):
        axes.plot(*_thin(x, y), color="#0b3d77", marker="." if len(y) < 60 else None)
        # A schedule with drops spans decades; one that ends at 0 has no logarithm.
        if np.nanmin(y) > 0 and np.nanmax(y) / np.nanmin(y) > 20:
            draw_in_decades(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)


def _draw_groups(axes: Any, time: _Timeline, split: str) -> None:
    axes.set_title(f"{split}: top-1 of the ensemble by training count, %")
    for group, colour in {"all": "#1b1b1b", **GROUP_COLOURS}.items():
        x, y = time.get(f"{split}/ensemble/{group}/top1")
        if len(y):
            _plot_accuracy(axes, x, y, colour, group, strong=group == "all")
    _legend(axes)


def _draw_members(axes: Any, time: _Timeline, split: str, group: str) -> None:
    axes.set_title(f"{split}: top-1 of {'all images' if group == 'all' else group + '-shot classes'} by member, %")
    for index, member in enumerate(shown_members(_of_members(time, split, group))):
        x, y = time.get(f"{split}/{member}/{group}/top1")
        _plot_accuracy(axes, x, y, member_colour(index), member, strong=index == 0)
    _legend(axes)


def _of_members(time: _Timeline, split: str, group: str) -> dict[str, str]:
    """Return the accuracies of a group by member, as text, for `shown_members`."""
    names = [name.split("/")[1] for _, name in time.names() if re.fullmatch(f"{split}/[^/]+/{group}/top1", name)]
    return {member: str([*time.get(f"{split}/{member}/{group}/top1")[1]]) for member in names}


def _plot_accuracy(axes: Any, x: NDArray[Any], y: NDArray[Any], colour: str, name: str, *, strong: bool) -> None:
    axes.plot(x, 100 * y, color=colour, marker="o" if len(y) < 40 else None, markersize=2.5,
              linewidth=2.2 if strong else 1.3, zorder=3 if strong else 2,
              label=f"{name} {100 * _last(y):.1f}")  # fmt: skip


def _mark_best(axes: Any, time: _Timeline, best: Mapping[str, Any], line: int, of: str) -> None:
    """Mark where the best evaluation is; `line` counts from below, so that no text hides another."""
    place = time.at(best["stage"], int(best["step"]))
    axes.axvline(place, color=BEST, linewidth=0.9, linestyle=(0, (4, 3)))
    text, at = f"best{of} on {best.get('selected_on', '?')}", (-3, 3 + 9 * line)
    axes.annotate(text, (place, 0), xycoords=("data", "axes fraction"), fontsize=7, color=BEST, xytext=at,
                  textcoords="offset points", ha="right")  # fmt: skip


def _legend(axes: Any, handles: Sequence[Any] | None = None) -> None:
    """Write the legend below the panel, where it hides no line, in as few lines as its width allows."""
    handles = handles or axes.get_legend_handles_labels()[0]
    if not handles:
        return
    longest = max(len(handle.get_label()) for handle in handles)
    lines = -(-len(handles) // max(1, _LEGEND_CHARACTERS // (longest + 5)))  # 5 for the line before a label
    columns = -(-len(handles) // lines)
    axes.legend(handles=handles, ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.17), borderaxespad=0,
                columnspacing=1.2, handlelength=1.6)  # fmt: skip


def _terms_legend(axes: Any, terms: Sequence[str], owners: Sequence[str], styles: Sequence[Any]) -> None:
    """Name the line style of each term and the colour of each member."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color="#777777", linestyle=styles[i % 4], label=term) for i, term in enumerate(terms)]
    handles += [Line2D([], [], color=member_colour(i + 1), label=owner) for i, owner in enumerate(owners)]
    _legend(axes, handles)


# Classes


def _class_counts(data: Mapping[str, Any], title: str) -> Any:
    """Draw the training images of every class on a log axis, classes sorted by decreasing count, groups in colour."""
    counts, order = sorted_counts(data)
    figure = new_figure(width_for(len(counts)), 4.4)
    axes = figure.add_subplot()
    _fill_counts(axes, counts[order])
    ratio = counts.max() / max(counts.min(), 1)
    set_figure_title(figure, f"{title}\n{counts.sum():,} training images, {len(counts):,} classes, ratio {ratio:.4g}")
    name_classes(axes, data, order)
    return figure


def _per_class(data: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], title: str, folder: Path) -> Any:
    """Draw the accuracy of every class for last and best, above the number of its training images.

    Args:
        data: content of data.json.
        found: the evaluations, by "last" and "best".
        title: of the picture.
        folder: that may hold predictions, which say how many test images a class has.
    """
    counts, order = sorted_counts(data)
    member = members(found)[0]
    figure = new_figure(width_for(len(counts)), 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    few = len(counts) <= NAMED_CLASSES  # bars with names; else a cloud of points with a running mean
    same = len(found) > 1 and found["last"].get("members") == found["best"].get("members")
    models = [("last", LAST)] if same else [("last", LAST), ("best", BEST)]
    for index, (which, colour) in enumerate(models):
        values = (found.get(which, {}).get("members", {}).get(member) or {}).get("per_class")
        if values is None or len(values) != len(counts):
            continue

        y = np.array([np.nan if value is None else 100 * value for value in values])[order]
        x = np.arange(len(y))
        mean = np.nanmean(y) if np.isfinite(y).any() else np.nan
        label = f"{which}{' and best' if same else ''}, epoch {found[which].get('epoch', '?')}"
        label += f": mean of classes {mean:.1f}"
        if few:
            width = 0.8 / len(models)
            places = x + (index - (len(models) - 1) / 2) * width
            top.bar(places, y, 0.95 * width, color=colour, alpha=0.85, label=label)
            _draw_intervals(top, places, y, folder, which, order)
        else:
            size = float(np.clip(2500 / len(y), 1.5, 14))
            top.scatter(x, y, s=size, color=colour, alpha=0.5 if len(y) < 1000 else 0.12, linewidths=0)
            top.plot(x, running_mean(y, max(5, len(y) // 25)), color=colour, linewidth=2, label=label)

    top.set_ylim(0, 102)
    top.set_ylabel("top-1, %")
    note = selection_note(found.get("best")).split(";")[0]
    more = f"; lines: mean over {max(5, len(counts) // 25)} neighbouring classes"
    if few:
        more = "; 95 % intervals of its test images" if file_of(folder, "last", "test").is_file() else ""
    set_figure_title(figure, f"{title}\nAccuracy of each class, {member}{more}" + (f"\n{note}" if note else ""))
    legend_above(top)
    _fill_counts(bottom, counts[order])
    name_classes(bottom, data, order)
    for axes in (top, bottom):
        for border in group_borders(counts[order]):
            axes.axvline(border - 0.5, color="#999999", linewidth=0.7, linestyle="--")
    return figure


def _draw_intervals(axes: Any, x: NDArray[Any], y: NDArray[Any], folder: Path, which: str, order: NDArray[Any]) -> None:
    """Draw how far an accuracy in % may be off for its number of test images, with 95 % probability."""
    images = images_per_class(file_of(folder, which, "test"), len(order))
    if images is None:
        return
    low, high = wilson_interval(y / 100, images[order])
    axes.errorbar(x, y, np.clip([y - 100 * low, 100 * high - y], 0, None), fmt="none", ecolor="#888888", elinewidth=0.9,
                  capsize=2)  # fmt: skip


def _fill_counts(axes: Any, counts: NDArray[Any]) -> None:
    from matplotlib.patches import Patch

    groups = np.array([group_of(count) for count in counts])
    x = np.arange(len(counts))
    if len(counts) <= 300:  # more bars than pixels would leave gaps
        axes.bar(x, counts, 0.8 if len(counts) <= NAMED_CLASSES else 1.0, color=[GROUP_COLOURS[g] for g in groups])
    else:
        for group in CLASS_GROUPS:
            axes.fill_between(x, counts, where=groups == group, step="mid", color=GROUP_COLOURS[group], linewidth=0)
    draw_in_decades(axes.yaxis)
    axes.set_ylim(bottom=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("training images")
    for border in (100, 20):
        axes.axhline(border, color="#777777", linewidth=0.6, linestyle=":")
    rule = {"many": "> 100", "medium": "20-100", "few": "< 20"}
    handles = [
        Patch(color=GROUP_COLOURS[group], label=f"{group} ({rule[group]}): {_classes(int((groups == group).sum()))}")
        for group in CLASS_GROUPS
    ]
    legend_above(axes, handles)


# Numbers


def _thin(x: NDArray[Any], y: NDArray[Any], points: int = 4000) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return every n-th point of a long line: a picture has no room for more."""
    every = max(1, len(x) // points)
    return x[::every], y[::every]


def _robust_limits(values: NDArray[Any]) -> tuple[float, float]:
    """Return limits for an axis that one spike does not spoil."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low, high = np.percentile(finite, [0.2, 99.8])
    room = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-3)
    return float(low - room), float(high + room)


def _last(values: NDArray[Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")


def _classes(count: int) -> str:
    return f"{count:,} class{'' if count == 1 else 'es'}"
