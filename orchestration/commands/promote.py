"""`expertail promote`: give an alias in MLflow's registry, `best` unless another is named, to a run's model.

    expertail promote runs/ride-birds-s0        then models:/expertail-birds-ride@best is that run's best model

A run that ends registers its models and takes no alias: which run is the one to use is decided by whoever compares.
"""

from __future__ import annotations

from pathlib import Path

from orchestration.config.compose import from_yaml
from orchestration.config.paths import expand
from orchestration.storage.files import CONFIG
from orchestration.storage.location import local_run
from orchestration.tracking.registry import set_alias
from orchestration.tracking.target import tracking_uri


def promote(run: str, which: str, stage: str, alias: str, uri: str | None) -> str:
    """Point an alias at a model of a run, and return a line about it.

    Args:
        run: the run folder or its URL.
        which: "best" or "last", of its models.
        stage: the final stage that the model is of, where the recipe has several; "" for the run's own result.
        alias: the name to give.
        uri: tracking server; None for the run's own.

    Raises:
        ValueError: there is no such run, or as `set_alias`.
    """
    with local_run(run) as copy:
        path = Path(expand(copy))
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path}: not a run folder (no {CONFIG}); needed one that `expertail train` made")
        config = from_yaml(path / CONFIG)
        model = f"{stage}-{which}" if stage else which
        return set_alias(path, uri or tracking_uri(config), config.tracking.experiment, model, alias)
