"""`expertail promote`: give an alias in MLflow's registry, `best` unless another is named, to a run's model.

    expertail promote runs/ride-birds-s0        then models:/expertail-birds@best is that run's best model
    expertail promote runs/night                then models:/night-birds@best is the best of the study night

A run that ends registers its models and takes no alias: which run is the one to use is decided by those who compare. Of
a study it is the run with the highest accuracy on the split that chose the epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestration.config.compose import from_yaml
from orchestration.config.paths import expand
from orchestration.storage.files import CONFIG
from orchestration.storage.location import local_run
from orchestration.storage.study_file import STUDY_FILE
from orchestration.tracking.registry import best_of_study, set_alias
from orchestration.tracking.target import tracking_uri


def promote(run: str, which: str, stage: str, alias: str, uri: str | None) -> str:
    """Point an alias at a model of a run, or of the best run of a study, and return a line for each alias.

    Args:
        run: the run folder or its URL, or the folder of a study.
        which: "best" or "last", of its models.
        stage: the final stage that the model is of, where the recipe has several; "" for the run's own result.
        alias: the name to give.
        uri: tracking server; None for the run's own.

    Raises:
        ValueError: there is no such run, or as `set_alias` and `best_of_study`.
    """
    model = f"{stage}-{which}" if stage else which
    with local_run(run) as copy:
        path = Path(expand(copy))
        if (path / STUDY_FILE).is_file():
            return "\n".join(_of_study(path, stage, model, alias, uri))
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path}: not a run folder (no {CONFIG}); needed one that `expertail train` made")
        config = from_yaml(path / CONFIG)
        return set_alias(path, uri or tracking_uri(config), config.tracking.experiment, model, alias)


def _of_study(study: Path, stage: str, model: str, alias: str, uri: str | None) -> Iterator[str]:
    first = next((run for run in sorted(study.glob(f"*/{CONFIG}"))), None)
    if first is None:
        raise ValueError(f"{study}: none of its runs has started; needed a finished one")
    uri = uri or tracking_uri(from_yaml(first))
    for choice in best_of_study(study, uri, stage, model):
        line = set_alias(choice.run, uri, from_yaml(choice.run / CONFIG).tracking.experiment, model, alias)
        yield f"{line}; {choice.why}"
