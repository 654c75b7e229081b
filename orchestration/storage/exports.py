"""Trained ensembles that a stage begins with or learns from: earlier stages of this run, and other runs.

Either is an exported model (aggregation/serving.py), so a teacher is loaded the same way wherever it comes from.
Checkpoints are verified before they are exported. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from aggregation.serving import DESCRIPTION, TrainingData, export_model, preprocessing_problem, read_description
from experts.ensemble import TRAINING_ONLY, part_of
from orchestration.config.compose import from_yaml
from orchestration.config.recipe import ModelSource, stage_classes
from orchestration.config.recipe_checks import head_problem, learnt_problems
from orchestration.config.run_config import RunConfig
from orchestration.storage.checkpoint import Checkpoints, inspect, read_tensors, verify
from orchestration.storage.files import CONFIG, RUN
from orchestration.storage.pretrained import check_pretrained
from orchestration.storage.run_folder import RunFolder


def check_sources(config: RunConfig, promised: Collection[str] = ()) -> None:
    """Refuse runs and files that the config names but that cannot be used, before anything is started.

    Args:
        config: of the run.
        promised: siblings that are trained before this one begins, and are not looked at.

    Raises:
        ValueError: names every run that is missing, unfinished or of other images, and pretrained weights that do not
            fit.
    """
    problems = []
    for key, source, stage in _named(config):
        if source.run is None or source.sibling in promised:
            continue
        if problem := _problem(source.folder(config.run.dir), source, config, stage):
            problems.append(f"{key}.run = {source.run}: {problem}")
    if config.method.backbone_weights is not None:
        try:
            check_pretrained(config.method.backbone_weights, config.backbone, config.method.reduce_dimension)
        except ValueError as misfit:
            problems.append(f"method.backbone_weights: {misfit}")
    if problems:
        raise ValueError("\n".join(problems))


def _named(config: RunConfig) -> Iterator[tuple[str, ModelSource, str | None]]:
    """Yield every source with its key, and the stage that begins with its weights; None for a teacher."""
    for name, stage in config.method.stages.items():
        if stage.start_from is not None:
            yield f"method.stages.{name}.start_from", stage.start_from, name
        for teacher, source in stage.teachers.items():
            yield f"method.stages.{name}.teachers.{teacher}", source, None


def _problem(folder: Path, source: ModelSource, config: RunConfig, stage: str | None) -> str | None:
    if not (folder / "config.yaml").is_file():
        return (
            "there is no run; needed the folder of a finished run, as runs/<run.name>, or in a study sibling:<recipe> "
            "for a run of its own"
        )
    try:
        status = json.loads((folder / RUN).read_text()).get("status")
    except (OSError, ValueError) as error:
        return f"{RUN} cannot be read ({type(error).__name__}); needed a finished run"
    if status != "finished":
        return f"the run is {status or 'not started'}; needed a finished one: if it has stopped, give its command again"
    if problem := _misfit(folder, source, config, stage):
        return problem
    return None if stage is None else _learnt_misfit(folder, source, config, stage)


def _learnt_misfit(folder: Path, origin: ModelSource, config: RunConfig, stage: str) -> str | None:
    """Return why a stage's rule does not fit what the experts of the run that it begins with have learnt."""
    if config.method.scores_trained_in(stage) is not None:
        return None  # its own steps decide, and those were checked with the recipe
    try:
        source = from_yaml(folder / CONFIG).method
    except ValueError:
        return None  # of an earlier version, which says nothing that could be asked
    final = origin.final or source.final
    problems = learnt_problems(config.method.aggregator_in(stage), source, final)
    return next((f"in its stage {source.scores_trained_in(final)}: {problem}" for problem in problems), None)


def _misfit(folder: Path, source: ModelSource, config: RunConfig, stage: str | None) -> str | None:
    model = folder / source.export / DESCRIPTION
    if not model.is_file():
        why = "restore the folder" if source.final is None else "name one of its final stages"
        return f"it has no {source.export}; needed its exported model; {why}"
    try:
        found = read_description(model)
    except ValueError as error:
        return str(error)
    if problem := preprocessing_problem(found.preprocessing, config.dataset):
        return f"its model {problem}"
    if stage is None:
        return None
    dropped = found.calibration is not None and not config.method.calibration_in(stage)
    if dropped and "heads" not in config.method.stages[stage].reinit:
        name = found.calibration["name"]  # type: ignore[index]
        return (
            f"its heads are calibrated by '{name}', which stage {stage} would leave out; set "
            f"method.stages.{stage}.calibration.name={name}, or reinit=[heads]"
        )
    return head_problem(config.method, stage, str(found.head.get("name")))


def model_folder(config: RunConfig, folder: RunFolder, checkpoints: Checkpoints, source: ModelSource) -> Path:
    """Return the folder of a source's exported model. A stage of this run is exported first.

    Raises:
        ValueError: a checkpoint is damaged.
    """
    if source.run is not None:
        return source.folder(config.run.dir) / source.export
    assert source.stage is not None
    target = folder.path / "export" / f"stage-{source.stage}-{source.weights}"
    weights, fitted = weights_of(checkpoints, source), _fitted(checkpoints, source.stage)
    export_stage(config, folder, source.stage, weights, target, fitted)
    return target


def _fitted(checkpoints: Checkpoints, stage: str) -> dict[str, Any]:
    """Return what a stage without steps chose; {} for any other stage."""
    newest = checkpoints.newest(stage, lambda _: None)
    return newest.state.get("fitted", {}) if newest is not None else {}


def weights_of(checkpoints: Checkpoints, source: ModelSource) -> Path:
    """Return the checkpoint of a finished stage of this run, its weights verified: the last, or the best evaluation's.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    assert source.stage is not None
    newest = checkpoints.newest(source.stage, lambda _: None)
    if newest is None:
        raise ValueError(f"{checkpoints.folder}: stage {source.stage} has no checkpoint; needed a finished stage")
    best = newest.state.get("best")
    folder = newest.folder.parent / best["checkpoint"] if source.weights == "best" and best else newest.folder
    verify(folder, momentum=False)
    return folder


def export_stage(
    config: RunConfig, folder: RunFolder, stage: str, checkpoint: Path, target: Path, fitted: dict[str, Any]
) -> None:
    """Write the ensemble of a stage's checkpoint as a served folder.

    Args:
        config: of the run.
        folder: of the run.
        stage: its name.
        checkpoint: folder of the weights.
        target: folder to write.
        fitted: numbers that the stage chose, which the model's description holds in place of nulls.
    """
    data, method = folder.read_data(), config.method
    # A stage may know some classes only; its model then names those alone.
    ids = stage_classes(method, stage, data["counts"])
    trained_on = TrainingData(
        dataset=config.dataset,
        class_names=[data["class_names"][c] for c in ids],
        counts=[data["counts"][c] for c in ids],
        image_shape=data["image_shape"],
    )
    ensemble = config.ensemble(stage, len(ids))
    chosen = fitted.get("values", {})
    ensemble = replace(ensemble, head=ensemble.head.model_copy(update=chosen.get("head", {})))
    rule = method.aggregator_in(stage).model_copy(update=chosen.get("aggregator", {}))
    state, means_something = ensemble_state(config, stage, checkpoint), method.gives_probabilities(stage)
    export_model(target, state, ensemble, rule, trained_on, gives_probabilities=means_something)


def ensemble_state(config: RunConfig, stage: str, checkpoint: Path) -> dict[str, Any]:
    """Read the `state_dict` of a stage's whole ensemble from a checkpoint, saved by any mesh, without auxiliaries."""
    state: dict[str, Any] = {}
    for name in ("trunk", "shared", *config.method.names_in(stage)):
        state |= read_tensors(checkpoint, name)
    return {name: tensor for name, tensor in state.items() if part_of(name) not in TRAINING_ONLY}


def export_finals(config: RunConfig, folder: RunFolder, stage: str, checkpoint: Path) -> None:
    """Write export/last and export/best, the ensemble of the stage that a run ended with, ready to serve.

    Where a recipe has several final stages, those that are trained have both in export/<stage>/ too.

    Args:
        config: of the run.
        folder: of the run.
        stage: that the run ended with.
        checkpoint: its newest.
    """
    _export(config, folder, stage, checkpoint, folder.path / "export")
    finals = config.method.finals
    checkpoints = Checkpoints(folder.path, list(config.method.stages))
    for final in finals if len(finals) > 1 else ():
        if (newest := checkpoints.newest(final, lambda _: None)) is not None:
            _export(config, folder, final, newest.folder, folder.path / "export" / final)


def _export(config: RunConfig, folder: RunFolder, stage: str, checkpoint: Path, target: Path) -> None:
    state = inspect(checkpoint)  # hashes state.json alone; tensors are hashed below
    best = state.get("best")
    sources = {"last": checkpoint, "best": checkpoint.parent / best["checkpoint"] if best else checkpoint}
    for source in set(sources.values()):  # both before either is written, and once if last is best
        verify(source, momentum=False)
    for name, source in sources.items():
        export_stage(config, folder, stage, source, target / name, state.get("fitted", {}))
