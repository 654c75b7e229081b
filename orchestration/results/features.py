"""Features before and after the stages of a run: on a plane, and the lengths of features and of the head's weights.

For each stage with steps, after the run:

    networks      as the stage began, and as it ended
    test images   of a few classes for the plane, some of every class for the lengths; decoded once for both networks
    pictures      report/features-<stage>.png and report/norms-<stage>.png     features_picture.py
    numbers       evaluation/features-<stage>.json

A stage that leaves the features as they are has no picture of them, and one that knows only some classes has neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aggregation.metrics import groups_by_count
from aggregation.projection import Projection, Rule, own_centre, project
from experts.batches import Replica
from experts.data.images import part_of_store
from experts.ensemble import Ensemble
from experts.eval_batches import EvalBatches
from orchestration.config.messages import in_one_line, say
from orchestration.config.recipe import ModelSource
from orchestration.results.features_picture import draw_features, draw_norms
from orchestration.results.saved_run import SavedRun, open_last, open_run, same_threads, stages_to_measure
from orchestration.results.style import picture_style, save_figure
from orchestration.results.text import listed, text_table
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.exports import ensemble_state, weights_of
from orchestration.storage.files import read_config
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.precision import casting
from orchestration.training.stage_files import start_from, start_from_model
from orchestration.training.stage_setup import StageSetup

PER_CLASS = 100
"""The most images of a class that are looked at."""
_LEAST_PER_CLASS = 10  # on a plane; fewer show no heap
_SHOWN_CLASSES = 10  # on a plane; more colours and marks could not be told apart
_PER_GROUP = 3  # where there are more classes
_IMAGES = 2000  # of all classes together
_PIXELS_ON_CPU = 2**23  # of all images together, where no GPU is at hand: 167 images of 224 x 224
_DIGITS = 6  # of numbers that are saved


@dataclass(frozen=True)
class Moment:
    """A network at the beginning or at the end of a stage, as the pictures show it.

    Attributes:
        features: of the images, [N, D] for each expert.
        weight_norms: lengths of the head's weights, [C] for each expert; None for a head without such weights.
    """

    features: list[NDArray[np.floating]]
    weight_norms: list[NDArray[np.float64] | None]


def draw_stages(run_dir: Path, opened: Callable[[], SavedRun] | None = None) -> list[Path]:
    """Draw the features of every stage of a run, as run.features_picture asks; a failure is a line on stderr.

    Args:
        run_dir: the run folder.
        opened: returns the run as `open_last` does; called where there is something to draw.

    Returns:
        The paths of the pictures; none after a failure.
    """
    settings = read_config(run_dir).get("run") or {}
    rule, drawn = settings.get("features_picture", "pca"), list[Path]()
    if rule not in ("pca", "tsne") or not (run_dir / "export").is_dir():
        return drawn
    try:
        saved = open_last(run_dir) if opened is None else opened()
        asked = settings.get("features_classes")
        chosen = _default_classes(saved) if asked is None else _named(asked, saved, f"run.features_classes={asked}")
        for stage in _stages(saved):
            drawn += _draw(saved, stage, chosen, rule, "")[0]
    except Exception as problem:  # a courtesy to a run that is trained: nothing here may make it fail
        say(f"features are not drawn: {in_one_line(problem)}")
    return drawn


def draw_chosen(run: str, classes: str | None, rule: Rule, overrides: list[str], stage: str | None = None) -> str:
    """Draw the features of a saved run again, of other classes or by another projection.

    Args:
        run: the run folder.
        classes: ids or names, separated by commas; None for some of each group.
        rule: the projection.
        overrides: as for `orchestration.results.saved_run.open_run`.
        stage: the stage to draw; None for all that have steps.

    Returns:
        The numbers as a table, and the paths of the pictures.

    Raises:
        ValueError: there is no such run or stage, or it is not trained; unknown classes, or one without a test image;
            as `project`, or `open_run` refuses the run.
    """
    saved = open_run(run, "last", "test", overrides, stages_to_measure(run, None)[-1])
    named = None if classes is None else _named(listed(classes), saved, f"--classes {classes}")
    chosen, stages = _default_classes(saved) if named is None else named, _stages(saved)
    if stage is not None and stage not in stages:
        raise ValueError(
            f"--stage {stage}: needed a stage that is trained, has steps and knows all classes: "
            f"{', '.join(stages) or 'none'}"
        )
    suffix = ("" if classes is None else "-" + "-".join(map(str, chosen))) + ("" if rule == "pca" else f"-{rule}")
    rows, lines = [["stage", "expert", "", "on the plane, %", "nearest to own mean, %"]], []
    for name in stages if stage is None else [stage]:
        paths, result, where = _draw(saved, name, chosen, rule, suffix)
        for one in result["members"]:
            for moment, found in one["moments"].items():
                variance = found["variance"]
                share = "n/a" if variance is None else f"{100 * variance:.1f}"
                rows.append([name, one["member"], moment, share, f"{100 * found['own_centre']:.1f}"])
        lines += [where, *(f"drawn as {path}" for path in paths)]
    return "\n".join([*text_table(rows, left=(0, 1, 2), rule=True), "", *lines])


def _stages(saved: SavedRun) -> list[str]:
    """Return the stages that have pictures: with steps, of all classes, and begun."""
    checkpoints = Checkpoints(saved.folder, list(saved.config.method.stages))
    return [
        name
        for name, stage in saved.config.method.stages.items()
        if stage.epochs and stage.classes is None and checkpoints.newest(name, lambda _: None) is not None
    ]


def _draw(
    saved: SavedRun, stage: str, classes: Sequence[int], rule: Rule, suffix: str
) -> tuple[list[Path], dict[str, Any], str]:
    """Draw one stage. Return the paths, the numbers, and a line that says where those are saved."""
    with same_threads(saved.config):
        positions = _positions(saved, classes)
        moments = _measure(saved, stage, positions)
        labels_N = saved.store.labels[positions]
        planes = _planes(moments, labels_N, classes, rule)
    result = _numbers(saved, stage, classes, rule, planes, moments, labels_N)
    names = saved.config.method.names_in(stage)
    title = f"{saved.config.method.name}, {saved.config.dataset.name}, run {saved.folder.name}: stage {stage}"
    folder = saved.folder / "report"
    folder.mkdir(exist_ok=True)
    paths = []
    with picture_style():
        if result["moved"]:
            paths.append(folder / f"features-{stage}{suffix}.png")
            save_figure(draw_features(title, result, dict(zip(names, planes, strict=True))), paths[-1])
        if not suffix:  # lengths depend neither on the classes shown nor on the projection
            paths.append(folder / f"norms-{stage}.png")
            save_figure(draw_norms(title, result, saved.data), paths[-1])
    return paths, result, saved.save(f"features-{stage}{suffix}", result)


# Classes and images


def _default_classes(saved: SavedRun) -> list[int]:
    """Return up to ten classes with test images: all, or else three of each group from frequent to rare."""
    counts_C = np.asarray(saved.data["counts"])
    there = np.isin(np.arange(len(counts_C)), saved.store.labels)
    order = [int(c) for c in np.argsort(-counts_C, kind="stable") if there[c]]
    if len(order) <= _SHOWN_CLASSES:
        return order
    chosen: list[int] = []
    groups = [[c for c in order if c in own] for own in map(set, groups_by_count(counts_C).values())]
    groups = [own for own in groups if own]
    for own in groups:
        number = min(len(own), _PER_GROUP * 3 // len(groups))
        chosen += [own[round(place)] for place in np.linspace(0, len(own) - 1, number)]
    return chosen


def _named(words: Sequence[int | str], saved: SavedRun, key: str) -> list[int]:
    """Return the ids of classes asked for by id or name, the most frequent first."""
    return sorted(saved.classes_named(words, key), key=lambda c: -saved.data["counts"][c])


def _positions(saved: SavedRun, shown: Sequence[int]) -> NDArray[np.int64]:
    """Return which test images to look at: the first ones of each class, more of those that are shown."""
    labels_N, counts = saved.store.labels, np.asarray(saved.data["counts"])
    budget = _IMAGES
    if saved.device.type == "cpu":  # the driver of a cluster may have no GPU
        budget = min(_IMAGES, _PIXELS_ON_CPU // saved.config.dataset.image_size**2)
    order = np.argsort(-counts, kind="stable")
    if len(order) > budget:  # of so many classes some will do, from frequent to rare
        order = order[np.linspace(0, len(order) - 1, budget).round().astype(int)]
    wanted_C = np.zeros(len(counts), dtype=np.int64)
    wanted_C[order] = np.clip(budget // len(order), 1, PER_CLASS)
    wanted_C[list(shown)] = np.clip(budget // len(shown), _LEAST_PER_CLASS, PER_CLASS)
    # The place of each image among those of its class, in the order of the split.
    by_class = np.argsort(labels_N, kind="stable")
    size_C = np.bincount(labels_N, minlength=len(counts))
    first_C = np.cumsum(size_C) - size_C
    rank_N = np.empty(len(labels_N), dtype=np.int64)
    rank_N[by_class] = np.arange(len(labels_N)) - first_C[labels_N[by_class]]
    return np.flatnonzero(rank_N < wanted_C[labels_N])


# Networks


def _measure(saved: SavedRun, stage: str, positions: NDArray[np.int64]) -> dict[str, Moment]:
    """Let the networks before and after a stage see some test images, each decoded once."""
    networks = {"before": _begun(saved, stage), "after": _ended(saved, stage)}
    images = EvalBatches(
        part_of_store(saved.store, positions),
        saved.dataset.config,
        saved.config.evaluation_batch_size(saved.device.type),
        Replica(device=saved.device, dtype=saved.dtype),
    )
    found: dict[str, list[list[torch.Tensor]]] = {moment: [] for moment in networks}
    with torch.no_grad():
        for images_B3HW, _ in images:
            for moment, network in networks.items():
                with casting(saved.config.engine, saved.device):
                    found[moment].append(network.features(images_B3HW))
    return {
        moment: Moment(
            [torch.cat(own).double().cpu().numpy() for own in zip(*found[moment], strict=True)],
            [_weight_norms(network, place, saved.dataset.num_classes) for place in range(len(network.names))],
        )
        for moment, network in networks.items()
    }


def _setup(saved: SavedRun, stage: str) -> StageSetup:
    """Return a stage as one worker with all experts would begin it without other weights."""
    experts = len(saved.config.method.names_in(stage))
    return StageSetup(saved.config, stage, saved.dataset, Mesh(mesh_shape(experts, 1), device=saved.device.type))


def _begun(saved: SavedRun, stage: str) -> Ensemble:
    setup, source = _setup(saved, stage), saved.config.method.starts_from(stage)
    if source is not None and source.run is not None:
        start_from_model(setup, source.folder(saved.config.run.dir) / source.export)
    elif source is not None:
        start_from(setup, weights_of(Checkpoints(saved.folder, list(saved.config.method.stages)), source))
    return setup.model.eval()


def _ended(saved: SavedRun, stage: str) -> Ensemble:
    model = _setup(saved, stage).model
    checkpoints = Checkpoints(saved.folder, list(saved.config.method.stages))
    weights = ensemble_state(saved.config, stage, weights_of(checkpoints, ModelSource(stage=stage)))
    model.load_state_dict(model.state_dict() | weights)  # what is for training alone is not among them
    return model.eval()


def _weight_norms(network: Ensemble, place: int, classes: int) -> NDArray[np.float64] | None:
    """Return the lengths of the weights of an expert's head, or of the head that all share, by class."""
    head: Any = network.shared["head"] if "head" in network.shared else network.members()[place].head
    weight = getattr(head, head.class_vectors, None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[head.class_axis] != classes:
        return None
    return weight.detach().double().norm(dim=1 - head.class_axis).cpu().numpy()


# Numbers


def _planes(
    moments: Mapping[str, Moment], labels_N: NDArray[np.int64], classes: Sequence[int], rule: Rule
) -> list[dict[str, Projection]]:
    """Return the projections before and after of the images of the chosen classes, for each expert.

    Each has a plane of its own: a network that has learnt has other features, of another size.
    """
    shown = np.isin(labels_N, classes)
    experts = range(len(moments["after"].features))
    return [{name: project(one.features[k][shown], rule) for name, one in moments.items()} for k in experts]


def _numbers(
    saved: SavedRun,
    stage: str,
    classes: Sequence[int],
    rule: Rule,
    planes: list[dict[str, Projection]],
    moments: Mapping[str, Moment],
    labels_N: NDArray[np.int64],
) -> dict[str, Any]:
    """Return what is saved beside the pictures; None where a class has no image or a head no weights."""
    shown = np.isin(labels_N, classes)
    measured = np.unique(labels_N)
    counts, names = saved.data["counts"], saved.data["class_names"]
    return {
        "split": saved.split,
        "stage": stage,
        "projection": rule,
        "class_ids": list(classes),
        "classes": [str(names[c]) for c in classes],
        "train_images": [counts[c] for c in classes],
        "labels": labels_N[shown].tolist(),
        "moved": any(
            not np.array_equal(one, other)
            for one, other in zip(moments["before"].features, moments["after"].features, strict=True)
        ),
        "members": [
            {
                "member": name,
                "moments": {
                    moment: {
                        "variance": None if plane.variance is None else _round(plane.variance),
                        "own_centre": own_centre(moments[moment].features[k][shown], labels_N[shown]),
                        "places": [[_round(x), _round(y)] for x, y in plane.places_N2],
                    }
                    for moment, plane in planes[k].items()
                },
                "norms": {moment: _norms(one, k, labels_N, measured, len(counts)) for moment, one in moments.items()},
            }
            for k, name in enumerate(saved.config.method.names_in(stage))
        ],
    }


def _norms(
    moment: Moment, expert: int, labels_N: NDArray[np.int64], measured: NDArray[np.int64], classes: int
) -> dict[str, Any]:
    """Return the lengths by class id: of the head's weights, and the mean length of the features of test images."""
    length_N = np.linalg.norm(moment.features[expert], axis=1)
    mean_C: list[float | None] = [None] * classes
    for c in measured.tolist():
        mean_C[c] = _round(length_N[labels_N == c].mean())
    weights_C = moment.weight_norms[expert]
    return {"weights": None if weights_C is None else [_round(w) for w in weights_C], "features": mean_C}


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
