"""The picture of decision regions before and after a final stage that trains heads alone, as H2T's does.

The features of test images of a few classes are projected onto a plane (`aggregation.regions`), the same before and
after. Every point of the plane has the colour of the class that the heads would choose there among those few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestration.config.compose import from_yaml
from orchestration.config.messages import in_one_line, say
from orchestration.config.paths import expand
from orchestration.config.recipe import ModelSource
from orchestration.config.recipe_checks import parts_that_learn
from orchestration.config.run_config import RunConfig
from orchestration.results.style import member_colour, new_figure, picture_style, save_figure, set_figure_title, shorten
from orchestration.results.text import listed, text_table

if TYPE_CHECKING:
    from aggregation.regions import Regions
    from aggregation.serving import ServedModel
    from orchestration.results.saved_run import SavedRun

_SIDE = 180  # points of the grid along each side
_LIGHT = 0.28  # strength of the colour of a region, 0 to 1


@dataclass(frozen=True)
class Panels:
    """The content of one pair of panels.

    Attributes:
        member: "ensemble" or the name of an expert.
        window: left, right, bottom and top, the same for both.
        variance: share of the variance of the features that the plane holds.
        moments: "before" and "after" -> the regions then.
    """

    member: str
    window: tuple[float, float, float, float]
    variance: float
    moments: dict[str, Regions]


def draw_regions_if_heads_alone(run_dir: Path) -> list[Path]:
    """Draw the regions of every final stage of a run that has trained heads alone; a failure is a line on stderr.

    Returns:
        The paths of the pictures, report/regions.png, or report/<stage>/regions.png where there are several final
        stages; none for any other run, and after a failure.
    """
    drawn = []
    try:
        if (run_dir / "config.yaml").is_file():
            config = from_yaml(run_dir / "config.yaml")
            stages = _final_stages(config)
            drawn = [
                _draw(run_dir, stage, None, [])[0] for stage in stages if not _why_no_regions(run_dir, config, stage)
            ]
    except Exception as problem:  # a courtesy to a run that is trained: nothing here may make it fail
        say(f"decision regions are not drawn: {in_one_line(problem)}")
    return drawn


def _final_stages(config: RunConfig) -> list[str]:
    """Return the final stages by the names of their folders, as `SavedRun.stage`: "" for the only one."""
    finals = config.method.finals
    return list(finals) if len(finals) > 1 else [""]


def draw_regions(run: str, classes: str | None, overrides: list[str], stage: str | None = None) -> str:
    """Draw the regions of a saved run: report/regions.png, or regions-<ids>.png for given classes.

    Where there are several final stages, the picture lies in report/<stage>/.

    Args:
        run: the run folder.
        classes: ids or names, separated by commas; None for the most frequent class and the rarest.
        overrides: as for `orchestration.results.saved_run.open_run`.
        stage: the final stage to draw; None for the last that can be drawn.

    Returns:
        The numbers of the picture as a table, and the paths of both.

    Raises:
        ValueError: there is no such run or final stage; the stage has not begun or trains more than heads; fewer than
            two classes, unknown ones, or one without a test image; `open_run` refuses the run.
    """
    from orchestration.results.saved_run import stages_to_measure

    folder = expand(run)
    stages, config = stages_to_measure(run, stage), from_yaml(folder / "config.yaml")
    reasons = {final: _why_no_regions(folder, config, final) for final in stages}
    drawable = [final for final, reason in reasons.items() if reason is None]
    if not drawable:
        raise ValueError(f"{folder}: {reasons[stages[-1]]}")
    final = drawable[-1]
    picture, result, saved = _draw(folder, final, classes, overrides)
    rows = [
        ["member", "model", *(f"{shorten(name)}: {what}" for name in result["classes"] for what in ("area", "right"))]
    ]
    for one in result["members"]:
        for moment, found in one["moments"].items():
            pairs = zip(found["area"], found["recall"], strict=True)
            shares = [_percent(share) for pair in pairs for share in pair]
            rows.append([one["member"], f"{moment}, {result[moment]}", *shares])
    lines = [
        *text_table(rows, rule=True),
        "area: share of the plane; right: share of the class's test images, choosing among these classes",
        "",
    ]
    return "\n".join([*lines, saved, f"drawn as {picture}"])


def _why_no_regions(folder: Path, config: RunConfig, stage: str) -> str | None:
    """Return the reason why a final stage has no regions before and after, or None."""
    from orchestration.storage.files import read_json

    method, which = config.method, "final" if stage else "last"
    final = stage or method.final
    learns, source = parts_that_learn(method, final), method.starts_from(final)
    if learns != {"heads"} or source is None:
        return (
            f"its {which} stage, {final}, trains {', '.join(sorted(learns)) or 'nothing'}; needed a stage that "
            f"begins with trained weights and trains heads alone, e.g. dr_h2t, ride_h2t or reslt_h2t"
        )
    before = method.head if source.stage is None else method.head_in(source.stage)
    if before != method.head_in(final):
        return f"its {which} stage, {final}, has another head than the one before; needed the same in both"
    reached = read_json(folder / "evaluation" / stage / "last.json").get("stage")
    if reached != final:
        return f"stage {final} has not begun (reached: {reached or 'nothing'}); train the run to its end first"
    return None


def _draw(folder: Path, stage: str, asked: str | None, overrides: list[str]) -> tuple[Path, dict[str, Any], str]:
    """Draw the picture. Return its path, its numbers, and a line that says where those are saved."""
    from orchestration.results.saved_run import open_run, same_threads

    saved = open_run(str(folder), "last", "test", overrides, stage)
    classes = _classes(asked, saved)
    with same_threads(saved.config):
        shown, labels_N = _measure(saved, classes)
    name = "regions" if asked is None else "regions-" + "-".join(map(str, classes))
    result = _numbers(saved, classes, shown)
    path = folder / "report" / stage / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with picture_style():
        save_figure(_figure(saved, result, shown, labels_N), path)
    return path, result, saved.save(name, result)


def _classes(asked: str | None, saved: SavedRun) -> list[int]:
    """Return the ids of the classes to show; by default the most frequent and the rarest that have test images."""
    counts = saved.data["counts"]
    if asked is None:
        there = set(np.unique(saved.store.labels).tolist())
        order = [c for c in sorted(range(len(counts)), key=lambda c: -counts[c]) if c in there]
        return [order[0], order[-1]]
    words = listed(asked)
    classes = saved.classes_named(words, f"--classes {asked}")
    if len(classes) < len(words) or len(classes) < 2:
        raise ValueError(f"--classes {asked}: needed two or more different classes, e.g. --classes 0,{len(counts) - 1}")
    return classes


def _starting_weights(saved: SavedRun) -> ModelSource:
    source = saved.config.method.starts_from(saved.final)
    assert source is not None, "see _why_no_regions"
    return source


def _starting_model(saved: SavedRun) -> ServedModel:
    """Return the model that the last stage began with, on the device and in the precision of the run."""
    from aggregation.serving import ServedModel, load_model
    from orchestration.storage.checkpoint import Checkpoints
    from orchestration.storage.exports import ensemble_state, weights_of

    method, source = saved.config.method, _starting_weights(saved)
    if source.run is not None:
        model = load_model(source.folder(saved.config.run.dir) / source.export)
    else:
        assert source.stage is not None
        checkpoint = weights_of(Checkpoints(saved.folder, list(method.stages)), source)
        model = load_model(saved.folder / "export" / saved.stage / saved.which)
        model.ensemble.load_state_dict(ensemble_state(saved.config, source.stage, checkpoint))
        rule = method.aggregator_in(source.stage).model_dump(mode="json")
        model = ServedModel(model.ensemble, model.description.model_copy(update={"aggregator": rule}))
    model.ensemble.to(saved.device, saved.dtype).eval()
    return model


def _measure(saved: SavedRun, classes: list[int]) -> tuple[list[Panels], NDArray[np.int64]]:
    """Compute the regions of every member before and after; return them, and each image's place in `classes`.

    Both models see each image once. For each member, one plane is fitted to the features of both moments together, so
    that the two panels can be compared.
    """
    import torch

    from aggregation.regions import ENSEMBLE, decision_regions, features_of, fit_plane, laid_end_to_end, window_of
    from experts.batches import Replica
    from experts.eval_batches import EvalBatches
    from orchestration.training.precision import casting

    part = saved.dataset.only(np.array(classes))
    size = saved.config.evaluation_batch_size(saved.device.type)
    models = {"before": _starting_model(saved), "after": saved.model}
    found: dict[str, list[list[Any]]] = {moment: [] for moment in models}
    labels = []
    replica = Replica(device=saved.device, dtype=saved.dtype)
    for images_B3HW, labels_B in EvalBatches(part.test, part.config, size, replica):
        labels.append(labels_B.cpu().numpy())
        for moment, model in models.items():
            with casting(saved.config.engine, saved.device):
                found[moment].append(features_of(model, images_B3HW))

    labels_N = np.concatenate(labels)
    features = {m: [torch.cat(own).to(saved.dtype) for own in zip(*rows, strict=True)] for m, rows in found.items()}

    names = list(saved.model.ensemble.names)
    shown = []
    for member in [ENSEMBLE, *(names if len(names) > 1 else [])]:
        own = {m: every if member == ENSEMBLE else [every[names.index(member)]] for m, every in features.items()}
        laid = {moment: laid_end_to_end(values) for moment, values in own.items()}
        plane = fit_plane(np.concatenate(list(laid.values())))
        window = window_of([plane.places(points) for points in laid.values()])
        regions = {
            moment: decision_regions(model, member, own[moment], labels_N, classes, plane, window, _SIDE)
            for moment, model in models.items()
        }
        shown.append(Panels(member, window, plane.variance, regions))
    return shown, labels_N


def _numbers(saved: SavedRun, classes: list[int], shown: Sequence[Panels]) -> dict[str, Any]:
    """Return what is saved beside the picture; fractions, None where a class has no image."""
    source = _starting_weights(saved)
    return {
        **saved.origin(),
        "run": saved.folder.name,
        "before": f"stage {source.stage}" if source.stage else f"run {Path(source.run or '').name}",
        "after": f"stage {saved.final}",
        "class_ids": classes,
        "classes": [str(saved.data["class_names"][c]) for c in classes],
        "train_images": [saved.data["counts"][c] for c in classes],
        "members": [
            {
                "member": one.member,
                "plane_variance": one.variance,
                "moments": {
                    moment: {
                        "area": regions.area_K.tolist(),
                        "recall": [None if np.isnan(value) else value for value in regions.recall_K.tolist()],
                        "faithful": regions.faithful,
                    }
                    for moment, regions in one.moments.items()
                },
            }
            for one in shown
        ],
    }


def _figure(saved: SavedRun, result: Mapping[str, Any], shown: Sequence[Panels], labels_N: NDArray[np.int64]) -> Any:
    """Draw pairs of panels, before and after, two pairs per row."""
    pairs = min(2, len(shown))
    rows = -(-len(shown) // pairs)
    figure = new_figure(7.6 * pairs, 1.1 + 3.9 * rows)
    method, dataset = saved.config.method, saved.config.dataset.name
    flow = method.stages[saved.final].flow
    names = ", ".join(
        f"{shorten(name)} ({count:,} training images)"
        for name, count in zip(result["classes"][:6], result["train_images"], strict=False)
    )
    rest = f" and {len(result['classes']) - 6} more" if len(result["classes"]) > 6 else ""
    ratio = f", ratio {flow.ratio:g}" if hasattr(flow, "ratio") else ""
    apart = ", of all experts laid end to end for the ensemble" if len(shown) > 1 else ""
    set_figure_title(
        figure,
        f"{method.name}, {dataset}, run {saved.folder.name}: decisions among {names}{rest},\n"
        f"before and after heads alone were trained (flow {flow.name}{ratio}). Points: features of test images, cross: "
        f"wrong;\nbackground: the heads' choice there. Plane: two principal components of the features{apart}",
    )
    for place, one in enumerate(shown):
        for column, (moment, regions) in enumerate(one.moments.items()):
            axes = figure.add_subplot(rows, 2 * pairs, 2 * place + column + 1)
            _draw_regions(axes, one, regions, labels_N, [shorten(name) for name in result["classes"]])
            who = one.member if one.member != "ensemble" else f"ensemble, {_rule(saved, moment)}"
            axes.set_title(f"{who}\n{moment}: {result[moment]}")
            if column == 0:
                axes.set_ylabel(f"the plane holds {100 * one.variance:.0f} % of the variance")
            if place == 0 and column == 0:
                axes.legend(loc="best", frameon=True, framealpha=0.8, edgecolor="none")
    return figure


def _rule(saved: SavedRun, moment: str) -> str:
    method, source = saved.config.method, _starting_weights(saved)
    if len(method.expert_names) == 1:
        return "its one expert"
    return str(method.aggregator_in(saved.final if moment == "after" or not source.stage else source.stage).name)


def _draw_regions(axes: Any, one: Panels, regions: Regions, labels_N: NDArray[np.int64], names: Sequence[str]) -> None:
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(member_colour(1 + k)) for k in range(len(names))])

    # Background: the class chosen at each point of the plane, with a line round every region that is not everything.
    light = 1 - _LIGHT * (1 - colours)
    axes.imshow(light[regions.region_GG], extent=one.window, origin="lower", aspect="auto", interpolation="nearest")
    for k in range(len(names) if len(names) > 2 else 1):  # two regions share one line
        if 0 < regions.area_K[k] < 1:
            inside = (regions.region_GG == k).astype(float)
            axes.contour(inside, [0.5], extent=one.window, origin="lower", colors="#444444", linewidths=0.8)

    # Test images in the colour of their class: dots where the classifier is right, crosses where it is wrong.
    size = float(np.clip(3000 / len(labels_N), 3, 16))
    for k, name in enumerate(names):
        own = labels_N == k
        wrong = own & (regions.predicted_N != k)
        x, y = regions.places_N2.T
        axes.scatter(x[own & ~wrong], y[own & ~wrong], s=size, color=colours[k], linewidths=0, label=name)
        axes.scatter(x[wrong], y[wrong], s=2 * size, color=colours[k], marker="x", linewidths=0.9)

    axes.set_xticks([])  # distances in the plane have no unit
    axes.set_yticks([])
    axes.grid(visible=False)
    lines = [
        f"{name}: {100 * area:.0f} % of the area, {_percent(None if np.isnan(recall) else recall)} right"
        for name, area, recall in zip(names, regions.area_K, regions.recall_K, strict=True)
    ]
    if len(lines) > 4:  # more than fits below a panel: the numbers are in the file beside the picture
        lines = [f"{100 * float((regions.predicted_N == labels_N).mean()):.1f} % of all images right"]
    lines.append(f"plane and classifier agree on {100 * regions.faithful:.0f} % of the images")
    axes.set_xlabel("\n".join(lines), fontsize=8)


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f} %"
