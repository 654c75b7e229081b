"""The report as one page that can be mailed: pictures inside, nothing fetched, tables sort by a click on a heading."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from experts.data.names import visible
from orchestration.reports.blocks import Block, Cell, across_block, blocks, foot_lines
from orchestration.reports.report import Report, Section

_OPEN = ("accuracy", "published", "differences")
"""Blocks that are open at once; the others open with a click, and on paper."""

_STYLE = """
:root { color-scheme: light; --ink: #1b1b1b; --soft: #5c5c5c; --line: #dedede; --stripe: #f6f7f9; --accent: #3b6fb6 }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: #fff; max-width: 1400px;
  margin: 0 auto; padding: 1.5em 2em 4em }
h1 { font-size: 1.6em; margin: 0 0 .2em } h2 { font-size: 1.2em; margin: 2.4em 0 .2em; padding-top: .6em;
  border-top: 2px solid var(--ink) } p { margin: .3em 0 } .soft, .notes { color: var(--soft); font-size: 13px }
ul.answers { margin: .8em 0; padding: .7em 1em .7em 2em; background: var(--stripe);
  border-left: 4px solid var(--accent) }
nav { font-size: 13px; margin: .8em 0 } nav a { color: var(--accent); margin-right: 1.2em; text-decoration: none }
details { margin: 1.2em 0 } summary { font-weight: 600; cursor: pointer }
.scroll { overflow-x: auto; margin: .5em 0 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .28em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { border-bottom: 1.5px solid var(--ink); vertical-align: bottom; cursor: pointer; user-select: none;
  white-space: normal; max-width: 9em; font-weight: 600 }
th::after { content: " \\2195"; color: #b9b9b9; font-size: 10px } th[aria-sort=ascending]::after { content: " \\2191" }
th[aria-sort=descending]::after { content: " \\2193" }
th.prose, td.prose { text-align: left } td.prose { white-space: normal; min-width: 11em; max-width: 34em;
  overflow-wrap: anywhere }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; white-space: nowrap; text-align: left;
  font-weight: 500; max-width: none }
tbody tr:hover td { background: var(--stripe) } td.strong { font-weight: 700 } tr.base td { background: #eef3fb }
figure { margin: 1.4em 0 } img { max-width: 100%; height: auto; display: block }
figcaption { color: var(--soft); font-size: 13px }
@media print { body { max-width: none; padding: 0; font-size: 10pt } th::after { content: "" } nav { display: none }
  .scroll { overflow: visible } table { font-size: 7.5pt } th, td { padding: .15em .35em }
  td:first-child, th:first-child { position: static }
  figure, tr { break-inside: avoid } h2 { break-before: page } h2:first-of-type { break-before: auto } }
"""

_SCRIPT = """
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], place = head.cellIndex;
  const up = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && place === 0);
  head.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[place].dataset.sort;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined)
      || (up ? 1 : -1) * row_text(a, place).localeCompare(row_text(b, place));
    return (up ? 1 : -1) * (x - y);
  });
  body.append(...rows);
}));
const row_text = (row, place) => row.cells[place].textContent;
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => one.open = true));
"""


def html_page(report: Report, pictures: Sequence[tuple[int, Path, str]] = ()) -> str:
    """Return the whole report as one page.

    Args:
        report: to lay out.
        pictures: number of the table, file and title of each.
    """
    title = _escaped(report.title)
    body = [f"<h1>{title}</h1>", f"<p>Shown: {_escaped(report.model_line)}.</p>"]
    body += [f"<p>{_escaped(line)}.</p>" for line in report.remarks]
    if len(report.sections) > 1:
        links = (f'<a href="#t{one.table.number}">{_name(one)}</a>' for one in report.sections)
        body.append(f"<nav>{''.join(links)}</nav>")
    for one in report.across:
        block = across_block(report, one)
        body += [f"<h2>{_escaped(block.title)}</h2>", *_details(block, None, " open")]
    body += _pictures([(path, name) for number, path, name in pictures if number == 0])
    for section in report.sections:
        own = [(path, name) for number, path, name in pictures if number == section.table.number]
        several = len(report.sections) > 1
        body += [*_head(section, several), *_tables(report, section), *_pictures(own)]
    if foot := list(foot_lines(report)):
        body += ["<h2>Not shown</h2>", "<ul>", *(f"<li>{_escaped(line)}</li>" for line in foot), "</ul>"]
    body += ["<h2>Made with</h2>", *_provenance(report)]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    text = "\n".join(body)
    start = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
    return f"{start}{text}\n<script>{_SCRIPT}</script></body></html>\n"


def _name(section: Section) -> str:
    data = section.table.data
    most, least = max(data.counts), min(data.counts)
    ratio = f", ratio {most / least:.4g}" if least else ""
    return _escaped(f"{section.table.number}. {data.name}{ratio}, {section.table.schedule.length}")


def _head(section: Section, numbered: bool) -> Iterator[str]:
    data = section.table.data
    name = _name(section) if numbered else _name(section).partition(". ")[2]
    yield f'<h2 id="t{section.table.number}">{name}</h2>'
    yield f"<p>{_escaped(data.line)}.</p>"
    yield f'<p class="soft">{_escaped(section.table.schedule.line)}. Data {_escaped(data.digest[:12])}.</p>'
    if section.answers:
        yield '<ul class="answers">'
        yield from (f"<li>{_escaped(answer)}</li>" for answer in section.answers)
        yield "</ul>"


def _tables(report: Report, section: Section) -> Iterator[str]:
    base = section.comparison.baseline if section.comparison else None
    for block in blocks(report, section):
        yield from _details(block, base, " open" if block.name in _OPEN else "")


def _details(block: Block, base: str | None, opened: str) -> Iterator[str]:
    yield f"<details{opened}><summary>{_escaped(block.title)}</summary>"
    yield '<div class="scroll">' + "".join(_table(block, base)) + "</div>"
    yield f'<p class="notes">{" ".join(_escaped(note) for note in block.notes)}</p></details>'


def _table(block: Block, base: str | None) -> Iterator[str]:
    yield "<table><thead><tr>"
    for column, text in enumerate(block.headings):
        yield f"<th{_kind(block, column)}>{_escaped(text)}</th>"
    yield "</tr></thead><tbody>"
    for row in block.rows:
        yield '<tr class="base">' if row[0].text == base else "<tr>"
        for column, cell in enumerate(row):
            yield _cell(block, column, cell)
        yield "</tr>"
    yield "</tbody></table>"


def _kind(block: Block, column: int) -> str:
    return ' class="prose"' if column in block.prose else ""


def _cell(block: Block, column: int, cell: Cell) -> str:
    kinds = [kind for kind, so in (("prose", column in block.prose), ("strong", cell.strong)) if so]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    sort = "" if cell.sort is None else f' data-sort="{cell.sort:.12g}"'
    return f"<td{kind}{sort}>{_escaped(cell.text)}</td>"


def _pictures(pictures: Sequence[tuple[Path, str]]) -> Iterator[str]:
    for path, name in pictures:
        pixels = base64.b64encode(path.read_bytes()).decode()
        text = _escaped(name)
        yield f'<figure><img alt="{text}" src="data:image/png;base64,{pixels}"><figcaption>{text}</figcaption></figure>'


def _provenance(report: Report) -> Iterator[str]:
    yield '<div class="scroll"><table><thead><tr><th>what</th><th class="prose">which</th><th>runs</th></tr></thead>'
    yield "<tbody>"
    for name, counts in report.provenance.items():
        for text, count in counts.items():
            yield (
                f'<tr><td>{_escaped(name)}</td><td class="prose">{_escaped(text)}</td>'
                f'<td data-sort="{count}">{count}</td></tr>'
            )
    yield "</tbody></table></div>"


def _escaped(text: str) -> str:
    return html.escape(visible(text))
