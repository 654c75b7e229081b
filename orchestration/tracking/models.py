"""Models of runs, wherever they are: in a run folder, in a folder of their own, in MLflow."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aggregation.serving import DESCRIPTION
from orchestration.config.paths import expand
from orchestration.config.run_config import RunSettings
from orchestration.config.secrets import redact
from orchestration.storage.location import local_run
from orchestration.tracking.uri import check_uri, default_uri, sqlite_path

SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")
"""Beginnings of the URI of an MLflow model."""
_VARIABLE = "MLFLOW_TRACKING_URI"


@contextmanager
def model_folder(source: str, which: str, stage: str = "") -> Iterator[Path]:
    """Yield the folder of an exported model; a copy of one in MLflow is removed at the end.

    Args:
        source: a run folder or its URL, the folder of an exported or of an MLflow model, or the URI of an MLflow model.
        which: "best" or "last", of a run's models.
        stage: the final stage whose model it is; "" for the run's own result.

    Raises:
        ValueError: there is no such model.
    """
    if source.startswith(SCHEMES):
        with tempfile.TemporaryDirectory() as scratch:
            yield _download_model(source, scratch)
        return
    with local_run(source) as run:
        folder = expand(run)
        if (folder / DESCRIPTION).is_file():
            yield folder
            return
        if (inside := _exported_in(folder)) is not None:
            yield inside
            return
        export = folder / "export" / stage / which
        if not (export / DESCRIPTION).is_file():
            there = sorted(
                path.parent.relative_to(folder).as_posix() for path in folder.glob(f"export/**/{DESCRIPTION}")
            )
            found = f"the run has {', '.join(there)}" if there else "no exported model there"
            beside = Path(RunSettings().dir) / source
            hint = f"did you mean {beside}? " if source and not there and (beside / "export").is_dir() else ""
            raise ValueError(
                f"{export}: {found}; {hint}needed the folder of a trained run, or of a model that it exported"
            )
        yield export


def _download_model(uri: str, scratch: str) -> Path:
    """Fetch a model that a run has sent.

    Args:
        uri: such as `models:/<name>/<version>`, in the store that MLFLOW_TRACKING_URI names,
            by default that of runs/.
        scratch: a folder for the copy.

    Returns:
        The folder of the exported ensemble in it.

    Raises:
        ValueError: there is no such model, or it is not of a run.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a line for every file
    import mlflow
    from mlflow.exceptions import MlflowException

    _choose_store(uri)
    try:
        place = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch))
    except (MlflowException, OSError) as problem:
        store = redact(mlflow.get_tracking_uri())
        raise ValueError(
            f"{uri}: {redact(str(problem))}; needed a model of the store that MLFLOW_TRACKING_URI names, now {store}"
        ) from None
    found = sorted(place.rglob(DESCRIPTION))
    if len(found) != 1:
        raise ValueError(f"{uri}: found {len(found)} {DESCRIPTION} in it; needed a model that a run has sent")
    return found[0].parent


def _choose_store(uri: str) -> None:
    """Take the store of runs/ where nobody names one: MLflow would make an empty one in this folder.

    Raises:
        ValueError: there is none.
    """
    import mlflow

    given = os.environ.get(_VARIABLE)
    if given and sqlite_path(given) is not None:
        mlflow.set_tracking_uri(check_uri(given))  # spelled so that MLflow makes no folder beside it
    if given or mlflow.is_tracking_uri_set():
        return
    store = default_uri(RunSettings().dir)
    path = sqlite_path(store)
    if path is None or not path.is_file():
        raise ValueError(f"{uri}: of which store? set {_VARIABLE}, e.g. to sqlite:////data/runs/mlflow.db")
    mlflow.set_tracking_uri(store)


def _exported_in(folder: Path) -> Path | None:
    """Return the exported ensemble in the folder of an MLflow model; None where the folder is no such model."""
    if not (folder / "MLmodel").is_file():
        return None
    found = sorted(folder.rglob(DESCRIPTION))
    if len(found) != 1:
        raise ValueError(f"{folder}: found {len(found)} {DESCRIPTION} in it; needed a model that a run has sent")
    return found[0].parent
