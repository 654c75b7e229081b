"""Keep what the weights of a trained stage say of every image. A failure costs the predictions and a line, no more."""

from __future__ import annotations

from collections.abc import Iterator

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
        probabilities = trained.config.method.gives_probabilities(stage)
        folders = [trained.folder.path / "evaluation" / name for name in below]
        write_predictions(folders, _predictions(trained), len(trained.counts), probabilities=probabilities)
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


def _predictions(trained: StageRun) -> Iterator[tuple[tuple[str, ...], str, Predictions]]:
    """Yield what last and best weights say of each split, one after the other: models, split, predictions."""
    best = trained.best if trained.best is not None and trained.best["step"] != trained.step else None
    for split in trained.splits:
        yield ("last", "best") if best is None else ("last",), split, _predicted(trained, split)
    if best is not None:
        # No step follows, so the workers need the last weights no more.
        trained.fleet.call("load_weights", trained.send(trained.checkpoints.folder / best["checkpoint"]))
        for split in trained.splits:
            yield ("best",), split, _predicted(trained, split)


def _predicted(trained: StageRun, split: str) -> Predictions:
    """Return what the workers' weights say of a split."""
    assert trained.last is not None
    members, limit = len(trained.last["evaluation"]["members"]), trained.config.run.predictions_mib
    # Scores in float16: as the workers send them, and once more, put together.
    size = 2 * 2 * trained.built[0][f"{split}_images"] * members * len(trained.counts)
    if size > limit * 2**20:
        trained.run.message_once(
            f"stage {trained.stage}: scores of the {split} images would take {bytes_(size)} of the driver's memory, "
            f"more than run.predictions_mib = {limit}; kept without them: class, rank and confidence of every image"
        )
    parts = trained.fleet.call("predict", split, size <= limit * 2**20)
    return Predictions.joined([part for part in parts if part is not None])
