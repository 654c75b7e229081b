"""`expertail sync`: upload to MLflow what is still missing of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from orchestration.config.compose import from_yaml
from orchestration.config.messages import say
from orchestration.storage.files import CONFIG, refuse_sweep
from orchestration.storage.location import local_run
from orchestration.storage.run_folder import RunFolder
from orchestration.storage.study_file import STUDY_FILE, read_study_file
from orchestration.storage.url_store import UrlStore, is_url
from orchestration.tracking.ownership import settle_ownership
from orchestration.tracking.sender import sync
from orchestration.tracking.target import tracking_uri


def sync_run(run: str, uri: str | None) -> str | None:
    """Upload what is missing of a run, or of a study and all its runs.

    Args:
        run: the run folder or its URL, or the folder of a study.
        uri: tracking server; None for the run's own.

    Returns:
        None, or what is still missing and why.

    Raises:
        ValueError: there is no such run, or its folder is damaged.
    """
    if is_url(run):
        with local_run(run) as copy:
            return _sync(Path(copy), uri, UrlStore(run).url)

    path = Path(run)
    refuse_sweep(path)
    if (path / STUDY_FILE).is_file():
        return _sync_all(path, [path / point["run"] for point in read_study_file(path)["points"]], uri)
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path}: not a run folder (no {CONFIG}); needed one that `expertail train` made")
    with contextlib.closing(RunFolder(path)):  # refuses a run that is training: its own uploader sends it
        return _sync(path, uri)


def _sync(path: Path, uri: str | None, url: str | None = None) -> str | None:
    config = from_yaml(path / CONFIG)
    if line := settle_ownership(path, url):
        say(line)
    return sync(path, uri or tracking_uri(config), config.tracking.experiment, path.name)


def _sync_all(path: Path, runs: Sequence[Path], uri: str | None) -> str | None:
    """Upload the runs of a study, and what is its own."""
    started = [run for run in runs if (run / CONFIG).is_file()]
    if not started:
        raise ValueError(f"{path}: none of its runs has started; needed at least one; start it again")

    if line := settle_ownership(path):  # before its runs, whose parent in MLflow is the one that it names
        say(line)
    # The runs first, then what is the study's own: means of its rows, and files.
    problems = [_or_problem(run, uri) for run in started]
    config = from_yaml(started[0] / CONFIG)
    problems.append(sync(path, uri or tracking_uri(config), config.tracking.experiment, path.name))
    return "\n".join(filter(None, problems)) or None


def _or_problem(run: Path, uri: str | None) -> str | None:
    """Upload what is missing of a run of a study. A run that trains or is damaged costs itself and a line."""
    try:
        return sync_run(str(run), uri)
    except ValueError as problem:
        return str(problem)
