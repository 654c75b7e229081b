"""The report as Markdown, laid out as in docs/results.md; and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experts.data.names import visible
from orchestration.reports.blocks import Block, Cell, accuracy_block, across_block, blocks, foot_lines
from orchestration.reports.report import Report, Section
from orchestration.results.text import text_table


def markdown(report: Report, pictures: Sequence[tuple[int, str, str]] = ()) -> str:
    """Return the whole report.

    Args:
        report: to lay out.
        pictures: number of the table, file and title of each, beside the text.
    """
    lines = [f"# {_plain(report.title)}", ""]
    lines += [f"{_plain(line)}\n" for line in report.remarks]
    for one in report.across:
        lines += [*_block(across_block(report, one), "##"), ""]
    lines += [*_images(pictures, 0), ""] if report.across else []
    for section in report.sections:
        lines += _head(report, section)
        for block in blocks(report, section):
            lines += ["", *_block(block, "###")]
        lines += [*_images(pictures, section.table.number), ""]
    if foot := list(foot_lines(report)):
        lines += ["## Not shown", "", *(f"- {_plain(line)}" for line in foot), ""]
    lines += ["## Made with", ""]
    for name, counts in report.provenance.items():
        lines += [
            f"- {name}: {_plain(text)} ({count} run{'' if count == 1 else 's'})" for text, count in counts.items()
        ]
    return "\n".join(lines) + "\n"


def _block(block: Block, level: str) -> list[str]:
    return [f"{level} {_plain(block.title)}", "", *_table(block), "", *map(_plain, block.notes)]


def _images(pictures: Sequence[tuple[int, str, str]], table: int) -> Iterator[str]:
    """Yield the pictures of a table; of number 0, those of several."""
    for number, file, title in pictures:
        if number == table:
            yield from ("", f"![{_plain(title)}]({file})")


def terminal(report: Report) -> str:
    """Return what a terminal shows: the answers and the accuracies; the rest is in the files."""
    lines = [*report.remarks]
    for one in report.across:
        lines += ["", *_text(across_block(report, one))]
    for section in report.sections:
        lines += ["", section.table.data.line, section.table.schedule.line, *section.answers, ""]
        lines += _text(accuracy_block(report, section))
    foot = list(foot_lines(report))
    lines += ["", "not shown:", *(f"  {line}" for line in foot)] if foot else []
    return "\n".join(lines).strip("\n")


def _text(block: Block) -> list[str]:
    rows = [list(block.headings), *([cell.text for cell in row] for row in block.rows)]
    return [*text_table(rows, rule=True), *block.notes]


def _head(report: Report, section: Section) -> Iterator[str]:
    number = f"{section.table.number}. " if len(report.sections) > 1 else ""
    yield f"## {number}{_plain(section.table.data.line)}"
    yield ""
    yield f"{_plain(section.table.schedule.line)}."
    if section.answers:
        yield ""
        yield from (f"- {_plain(answer)}" for answer in section.answers)


def _table(block: Block) -> Iterator[str]:
    yield _line([_escaped(text) for text in block.headings])
    yield _line(["---" if column in block.prose else "---:" for column in range(len(block.headings))])
    for row in block.rows:
        yield _line([_cell(cell, column) for column, cell in enumerate(row)])


def _cell(cell: Cell, column: int) -> str:
    text = _escaped(cell.text)
    if column == 0:
        return f"`{visible(cell.text).replace('|', '/').replace('`', ' ')}`"
    return f"**{text}**" if cell.strong else text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _plain(text: str) -> str:
    return visible(text).replace("\n", " ")
