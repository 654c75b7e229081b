"""`expertail status`: how far the runs of a study or a folder are."""

from __future__ import annotations

from pathlib import Path

from orchestration.config.paths import expand
from orchestration.config.run_config import RunSettings
from orchestration.studies.status import status_text


def status(place: str) -> str:
    """Return a table of runs.

    Args:
        place: folder of a study, of runs or of one run; or the name of a study below runs/.

    Raises:
        ValueError: there are no runs.
    """
    path = Path(expand(place))
    below = Path(expand(RunSettings().dir)) / place
    return status_text(below if not path.exists() and below.exists() else path)
