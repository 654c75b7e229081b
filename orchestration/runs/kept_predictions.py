"""Keep what the weights of a trained stage say of every image. A failure costs the predictions and a line, no more."""

from __future__ import annotations

from typing import Any

from aggregation.predictions import Predictions
from orchestration.cluster.failures import WorkerLost
from orchestration.config.messages import in_one_line
from orchestration.config.run_config import RunConfig
from orchestration.results.text import bytes_
from orchestration.runs.run import Run
from orchestration.runs.stage_run import StageRun, folders_of_results
from orchestration.storage.predictions import MEASURES, write_predictions
from orchestration.storage.run_folder import RunFolder


def keeps_predictions(config: RunConfig, stage: str) -> bool:
    """Return whether predictions of a stage are to be kept once it is trained."""
    return config.run.predictions and stage in config.method.finals


def keep_predictions(trained: StageRun) -> None:
    """Keep what the last and the best weights say of every image of validation and test.

    Args:
        trained: the stage after its last step, its workers with the last weights.

    Raises:
        WorkerLost: as `Fleet.call`. Any other failure is noted in run.json and costs a line.
    """
    run, stage = trained.run, trained.stage
    below = folders_of_results(trained.config, stage)
    try:
        kept = {"last": _predicted(trained)}
        kept["best"] = kept["last"]
        if trained.best is not None and trained.best["step"] != trained.step:
            # No step follows, so the workers need the last weights no more.
            best = trained.checkpoints.folder / trained.best["checkpoint"]
            trained.fleet.call("load_weights", trained.send(best))
            kept["best"] = _predicted(trained)
        probabilities = trained.config.method.gives_probabilities(stage)
        folders = [trained.folder.path / "evaluation" / name for name in below]
        write_predictions(folders, kept, len(trained.counts), probabilities=probabilities)
        run.record_predictions(stage, None)
    except WorkerLost:
        raise
    except Exception as problem:
        give_up_predictions(run, stage, problem)


def give_up_predictions(run: Run, stage: str, problem: BaseException) -> None:
    """Note and say why there are no predictions of a stage; a later start does not ask for them again."""
    cause = in_one_line(problem)
    run.console.message(f"stage {stage}: predictions were not kept: {cause}")
    run.record_predictions(stage, cause)


def predictions_missing(folder: RunFolder, config: RunConfig, stage: str) -> bool:
    """Return whether a final stage has none of the predictions that it should keep: its start may have been killed.

    Those that were given up are not missed.
    """
    if not keeps_predictions(config, stage) or stage in folder.read_run().get("predictions", {}):
        return False
    return any(not (folder.path / "evaluation" / b / MEASURES).is_file() for b in folders_of_results(config, stage))


def _predicted(trained: StageRun) -> dict[str, Predictions]:
    """Return what the workers' weights say of each split."""
    config, num_classes = trained.config, len(trained.counts)
    members, limit = 1 + config.method.num_experts, config.run.predictions_mib
    size = 2 * trained.built[0]["test_images"] * members * num_classes  # bytes of the scores in float16
    with_scores = size <= limit * 2**20
    if not with_scores:
        trained.run.message_once(
            f"stage {trained.stage}: scores of the test images would take {bytes_(size)}, more than "
            f"run.predictions_mib = {limit}; kept without them: class, rank and confidence of every image"
        )
    found: dict[str, list[Any]] = {split: trained.fleet.call("predict", split, with_scores) for split in trained.splits}
    return {split: Predictions.joined([p for p in parts if p is not None]) for split, parts in found.items()}
