"""The report as LaTeX: a floating table for each table of the report. It needs the package booktabs."""

from __future__ import annotations

from collections.abc import Iterator

from experts.data.names import visible
from orchestration.reports.blocks import Block, Cell, across_block, blocks
from orchestration.reports.report import Report, Section

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "±": r"$\pm$", "…": r"\dots{}",
    "|": r"\textbar{}", '"': "''",
}  # fmt: skip


def latex(report: Report) -> str:
    """Return the whole report, to be read with \\input."""
    lines = [r"% \usepackage{booktabs,graphicx}"]
    for one in report.across:
        lines += ["", *_table(across_block(report, one))]
    for section in report.sections:
        for block in blocks(report, section):
            lines += ["", *_table(block, section)]
    return "\n".join(lines) + "\n"


def _table(block: Block, section: Section | None = None) -> Iterator[str]:
    columns = "".join("l" if column in block.prose else "r" for column in range(len(block.headings)))
    of_what = f"{section.table.data.line}; {section.table.schedule.line}. " if section else ""
    caption = f"{block.title}. {of_what}{' '.join(block.notes)}"
    yield r"\begin{table}"
    yield r"\centering"
    yield rf"\caption{{{escaped(caption)}}}"
    yield rf"\label{{tab:{block.name}-{section.table.number if section else 0}}}"
    yield r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    yield rf"\begin{{tabular}}{{{columns}}}"
    yield r"\toprule"
    yield " & ".join(escaped(text) for text in block.headings) + r" \\"
    yield r"\midrule"
    for row in block.rows:
        yield " & ".join(map(_cell, row)) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}}"
    yield r"\end{table}"


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    if text.startswith("["):  # after \\ a bracket would be read as a length
        text = "{}" + text
    return rf"\textbf{{{text}}}" if cell.strong else text


def escaped(text: str) -> str:
    """Return a text as LaTeX prints it: no character of a name is a command; a leading minus is one of mathematics."""
    found = "".join(_SPECIAL.get(character, character) for character in visible(text).replace("\n", " "))
    return f"$-${found[1:]}" if found[:1] == "-" and found[1:2].isdigit() else found
