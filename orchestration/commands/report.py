"""`expertail report`: finished runs as tables, differences with intervals, pictures and one page."""

from __future__ import annotations

from orchestration.config.messages import say
from orchestration.reports.markdown import terminal
from orchestration.reports.write import FILES, write_report


def report(targets: list[str], baseline: str | None, which: str | None, out: str | None) -> str:
    """Write the report of some runs.

    Args:
        targets: folders of runs, the folder of a study, or folders that hold runs.
        baseline: label of the row to compare with; None for the study's, or the first.
        which: "last" or "best", the models to show; None for what the study says, or "last".
        out: folder of the report; None for the usual one.

    Returns:
        The answers and accuracies as text, and where the rest is.

    Raises:
        ValueError: no run is finished, a target is no run, or the baseline is not there.
    """
    written = write_report(targets, say, baseline=baseline, which=which, out=out)
    return f"{terminal(written.report)}\n\nsaved in {written.folder}: {', '.join(FILES)}"
