"""All files of a report, in one folder: report.md, .csv, .tex, .json, index.html and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestration.reports.csv_file import csv_text
from orchestration.reports.html_page import html_page
from orchestration.reports.json_file import json_text
from orchestration.reports.latex import latex
from orchestration.reports.markdown import markdown
from orchestration.reports.pictures import draw_pictures
from orchestration.reports.report import Report, make_report
from orchestration.reports.sources import read_sources
from orchestration.storage.files import write_atomic

FILES = ("report.md", "report.csv", "report.tex", "report.json", "index.html")


@dataclass(frozen=True)
class Written:
    """A report that was written: what it shows, and its folder."""

    report: Report
    folder: Path


def write_report(
    targets: Sequence[str],
    say: Callable[[str], None],
    *,
    baseline: str | None = None,
    which: str | None = None,
    out: str | None = None,
    pictures: bool = True,
) -> Written:
    """Read runs and write their report. It may be repeated while runs train: what is finished is shown.

    Args:
        targets: folders of runs, the folder of a study, or folders that hold runs.
        say: takes a line where something cannot be shown.
        baseline: label of the row to compare with; None for the study's, or the first.
        which: "last" or "best", the models to show; None for the study's `report.model`, or "last".
        out: folder of the report; None for `report` in the folder of the study or beside the runs.
        pictures: whether to draw.

    Raises:
        ValueError: see `read_sources` and `make_report`.
    """
    found = read_sources(targets, out)
    report = make_report(found, say, baseline, which or found.asked.model)
    folder = found.folder
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_pictures(report, folder, say) if pictures else []
    beside = [(number, path.name, title) for number, path, title in drawn]
    texts = (markdown(report, beside), csv_text(report), latex(report), json_text(report), html_page(report, drawn))
    for name, text in zip(FILES, texts, strict=True):
        write_atomic(folder / name, text)
    return Written(report, folder)
