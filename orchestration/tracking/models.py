"""Models of runs, fetched from MLflow."""

from __future__ import annotations

import os
from pathlib import Path

from aggregation.serving import DESCRIPTION

SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")
"""Beginnings of the URI of an MLflow model."""


def download_model(uri: str, scratch: str) -> Path:
    """Fetch a model that a run has sent.

    Args:
        uri: such as `models:/<name>@best`, in the store that MLFLOW_TRACKING_URI names.
        scratch: a folder for the copy.

    Returns:
        The folder of the exported ensemble in it.

    Raises:
        ValueError: there is no such model, or it is not of a run.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a line for every file
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        place = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch))
    except (MlflowException, OSError) as problem:
        store = mlflow.get_tracking_uri()
        raise ValueError(
            f"{uri}: {problem}; needed a model of the store that MLFLOW_TRACKING_URI names, now {store}"
        ) from None
    found = sorted(place.rglob(DESCRIPTION))
    if len(found) != 1:
        raise ValueError(f"{uri}: found {len(found)} {DESCRIPTION} in it; needed a model that a run has sent")
    return found[0].parent
