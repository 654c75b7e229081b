"""The tracking store of a run's config. Kept apart from uri.py, which the uploading process loads without torch."""

from __future__ import annotations

from orchestration.config.paths import expand
from orchestration.config.run_config import RunConfig
from orchestration.storage.location import check_tracking
from orchestration.tracking.uri import default_uri


def tracking_uri(config: RunConfig) -> str:
    """Return where a run is tracked: the URI of its config, else a SQLite file beside the run folders.

    Raises:
        ValueError: the run folders are at a URL, and no URI is given.
    """
    if config.tracking.uri is None:
        check_tracking(config)
    return config.tracking.uri or default_uri(expand(config.run.dir))
