"""Blocks: the tables of a report as cells of text, the same for Markdown, LaTeX, the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestration.reports.across import Across, Member
from orchestration.reports.compare import Difference
from orchestration.reports.published import printed
from orchestration.reports.records import BY_COUNT, BY_INDEX, unfinished_lines
from orchestration.reports.report import Report, Section, spread_text
from orchestration.reports.rows import Row, stages_to
from orchestration.reports.statistics import FEWEST_CLASSES, Interval
from orchestration.results.text import decimals

_COUNT_RULE = {"many": "> 100", "medium": "20 to 100", "few": "< 20"}
_MOST_CLASSES_WITHOUT_TOP5 = 10


class Cell(NamedTuple):
    """Text, what a column is sorted by, and whether it stands out."""

    text: str
    sort: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Block:
    """One table of text.

    Attributes:
        name: short, for anchors and files.
        title: above it.
        notes: below it.
        headings: of the columns; the first column holds labels.
        rows: of as many cells.
        prose: columns that hold words and are aligned left.
    """

    name: str
    title: str
    notes: tuple[str, ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    prose: tuple[int, ...] = (0,)


def blocks(report: Report, section: Section) -> list[Block]:
    """Return the tables of a section that have something to show."""
    makers: tuple[Callable[[Report, Section], Block | None], ...] = (
        accuracy_block, _published_block, _classifiers_block, _differences_block, _index_differences_block,
        _bootstrap_block, _measures_block, _cost_block, _chosen_block, _relative_block,
    )  # fmt: skip
    return [block for make in makers if (block := make(report, section)) is not None]


def heading(section: Section, key: str) -> str:
    """Return the heading of a measure: its name, rule and number of classes."""
    name, groups = key.removesuffix("_by_index"), section.table.data.groups
    if key == "all":
        return "all"
    rule = _COUNT_RULE[name] if key in BY_COUNT else "by index"
    return f"{name} {rule} [{len(groups[key]):,}]"


def accuracy_block(report: Report, section: Section) -> Block:
    """Return top-1 by group, with published values where conditions are met."""
    keys, rows = section.measures, section.table.rows
    best = {key: _best_text(rows, key, report.which) for key in keys}
    with_published = any("all" in one.values for one in section.published.values())
    cells = []
    for row in rows:
        line = [Cell(row.label), _seeds_cell(section, row)]
        for key in keys:
            text = spread_text(row.spread(key, report.which))
            line.append(Cell(text, row.spread(key, report.which)[0], text.split(" ")[0] == best[key]))
        if with_published:
            line += _published_cells(section, row, report.which)
        cells.append(tuple(line))
    extra = ("published", "difference") if with_published else ()
    notes = [
        f"Top-1 in % of test images; a group is the mean over its classes; ± is the standard deviation over n seeds. "
        f"Shown: {report.model_line}."
    ]
    if not any(key in keys for key in BY_INDEX):
        notes.append("This data set has no groups by index.")
    return Block("accuracy", "Accuracy", tuple(notes), ("recipe", "n", *(heading(section, k) for k in keys), *extra),
                 tuple(cells))  # fmt: skip


def _classifiers_block(report: Report, section: Section) -> Block | None:
    """Return losses by classifiers, where several recipes end with several final stages.

    Source of the layout: Zhang et al. 2023, "Deep Long-Tailed Learning: A Survey", Table 7.
    """
    by_loss: dict[str, dict[str, Row]] = {}
    for row in section.table.rows:
        stage = row.records[0].stage
        by_loss.setdefault(row.label.replace(f"+{stage}", "", 1) if stage else row.label, {})[stage] = row
    several = {loss: own for loss, own in by_loss.items() if len(own) > 1}
    if len(several) < 2:
        return None
    stages = dict.fromkeys(stage for own in several.values() for stage in own)
    columns = [(stage, key) for stage in stages for key in section.measures if key not in BY_INDEX]
    rows = []
    for loss, own in several.items():
        spreads = [own[stage].spread(key, report.which) if stage in own else (None, None) for stage, key in columns]
        rows.append((Cell(loss), *(Cell(spread_text(spread), spread[0]) for spread in spreads)))
    notes = ("Top-1 in %, mean and standard deviation over seeds, by the final stage that gave the classifier.",)
    headings = ("loss", *(f"{stage}: {heading(section, key)}" for stage, key in columns))
    return Block("classifiers", "Losses by classifiers", notes, headings, tuple(rows))


def across_block(report: Report, one: Across) -> Block:
    """Return top-1 by group over a key whose values lie in different tables, with each row's own sizes of groups."""
    tables = {member.table.number: member.table for member in one.members}.values()
    keys = ["all", *(key for key in (*BY_COUNT, *BY_INDEX) if any(table.data.groups.get(key) for table in tables))]
    rows = []
    for name, members in one.families.items():
        for member in members:
            place = (Cell(name), Cell(member.value, member.number), Cell(str(len(member.row.seeds))))
            rows.append((*place, *(_sized_cell(member, key, report.which) for key in keys)))
    headings = [key.replace("_by_index", " by index") if key in BY_INDEX else key for key in keys]
    notes = (
        "Top-1 in % of test images, mean and standard deviation over n seeds; in brackets the classes of the group in "
        "the row's own data. Rows of different tables are not compared.",
    )
    return Block(f"across_{one.key.replace('.', '_')}", f"Accuracy over {one.name}", notes,
                 ("recipe", one.name, "n", *headings), tuple(rows))  # fmt: skip


def _sized_cell(member: Member, key: str, which: str) -> Cell:
    spread = member.row.spread(key, which)
    size = "" if key == "all" else f" [{len(member.table.data.groups.get(key, ())):,}]"
    return Cell(f"{spread_text(spread)}{size}", spread[0])


def _best_text(rows: Sequence[Row], key: str, which: str) -> str:
    """Return the best mean as it is shown: rows that round to it share the place."""
    means = [mean for row in rows if (mean := row.spread(key, which)[0]) is not None]
    return decimals(max(means), 100.0, 1) if means and len(rows) > 1 else ""


def _seeds_cell(section: Section, row: Row) -> Cell:
    missing = [seed for seed in section.seeds if seed not in row.seeds]
    text = str(len(row.seeds)) + (f" (no seed {', '.join(map(str, missing))})" if missing else "")
    return Cell(text, len(row.seeds))


def _published_cells(section: Section, row: Row, which: str) -> list[Cell]:
    """Return the published accuracy over all and the difference to it; groups have a table of their own."""
    found = section.published.get(row.label)
    expected = None if found is None else found.values.get("all")
    mean, _ = row.spread("all", which)
    if expected is None or mean is None:
        return [Cell(""), Cell("")]
    difference = 100 * mean - expected
    return [Cell(printed(expected), expected), Cell(f"{difference:+.1f}", difference)]


def _published_block(report: Report, section: Section) -> Block | None:
    """Return published values beside ours, measure by measure, with sources and remarks."""
    found, rows = section.published, []
    if not found:
        return None
    there = (*section.measures, "upper", "relative")
    measures = [key for key in there if any(key in one.values for one in found.values())]
    for row in section.table.rows:
        if (one := found.get(row.label)) is not None:
            cells = [_beside(one.values.get(key), _ours(section, row, key, report.which)) for key in measures]
            rows.append((Cell(row.label), Cell(one.name), *cells))
    remarks = [f"{one.name}: {remark}" for one in found.values() for remark in one.remarks]
    notes = [
        "Published, and in brackets ours minus published, percentage points; only beside rows that meet the conditions "
        "of what was published.",
        *(f"Source: {line}." for line in dict.fromkeys(one.source for one in found.values())),
        *(f"{line}." for line in dict.fromkeys(remarks)),
    ]
    headings = ("recipe", "published as", *(_published_heading(section, key) for key in measures))
    return Block("published", "Published values", tuple(notes), headings, tuple(rows), (0, 1))


def _published_heading(section: Section, key: str) -> str:
    return {"upper": "A_u", "relative": "A_r"}.get(key) or heading(section, key)


def _ours(section: Section, row: Row, key: str, which: str) -> float | None:
    """Return our mean of a published measure, a fraction."""
    if key in ("upper", "relative"):
        relative = section.relative.get(row.label)
        return None if relative is None else {"upper": relative.upper, "relative": relative.relative}[key][0]
    return row.spread(key, which)[0]


def _beside(published: float | None, ours: float | None) -> Cell:
    if published is None:
        return Cell("")
    return Cell(printed(published) + ("" if ours is None else f" ({100 * ours - published:+.1f})"), published)


def _interval_text(mean: float, interval: Interval | None) -> str:
    if interval is None:
        return f"{100 * mean:+.1f}"
    return f"{100 * mean:+.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _differences_block(report: Report, section: Section) -> Block | None:
    """Return the differences to the baseline with their intervals over seeds, and the words."""
    if section.comparison is None:
        return None
    told = tuple(dict.fromkeys((section.rarest, "all")))
    keys = [key for key in section.measures if key not in BY_INDEX]
    rows = []
    for row in _others(section):
        words = [section.difference(row.label, key) for key in told]
        rows.append((
            Cell(row.label),
            *(Cell("no seed in common" if one is None else one.words) for one in words),
            *(_seeds_interval_cell(section, row, key) for key in keys),
        ))  # fmt: skip
    tests = len(rows) * len(section.measures)
    notes = (
        "Percentage points; in brackets Student's 95 % interval over seeds, paired by seed. Bold: real at 95 %, that "
        "is, the interval over seeds excludes 0, and so does the bootstrap where there is one.",
        f"Each difference is judged alone: of {tests} that are none, about {max(1, round(0.05 * tests))} would be "
        f"called real.",
    )
    headings = ("recipe", *(f"{key.replace('_', ' ')}: what may be said" for key in told))
    return Block(
        "differences", f"Differences to {section.comparison.baseline}", notes,
        (*headings, *(heading(section, key) for key in keys)), tuple(rows), tuple(range(len(headings))),
    )  # fmt: skip


def _index_differences_block(report: Report, section: Section) -> Block | None:
    """Return the same for groups by index, which most papers of H2T's kind print."""
    keys = [key for key in section.measures if key in BY_INDEX]
    if section.comparison is None or not keys:
        return None
    rows = [(Cell(row.label), *(_seeds_interval_cell(section, row, key) for key in keys)) for row in _others(section)]
    return Block(
        "index_differences", f"Differences to {section.comparison.baseline}, classes by index", (),
        ("recipe", *(heading(section, key) for key in keys)), tuple(rows),
    )  # fmt: skip


def _others(section: Section) -> list[Row]:
    base = section.comparison.baseline if section.comparison else None
    return [row for row in section.table.rows if row.label != base]


def _seeds_interval_cell(section: Section, row: Row, key: str) -> Cell:
    one = section.difference(row.label, key)
    return Cell("n/a") if one is None else Cell(_interval_text(one.mean, one.over_seeds), one.mean, one.real)


def _bootstrap_block(report: Report, section: Section) -> Block | None:
    """Return the differences with their intervals over classes and test images."""
    if section.comparison is None:
        return None
    rows = []
    for row in section.table.rows:
        found = {key: one for key in section.measures if (one := section.difference(row.label, key)) is not None}
        if not any(one.over_images for one in found.values()):
            continue
        cells = [_image_cell(found[key]) if key in found else Cell("n/a") for key in section.measures]
        rows.append((Cell(row.label), *cells))
    if not rows:
        return None
    notes = (
        "Percentage points; in brackets the 95 % interval of a bootstrap from kept predictions, for these very models. "
        f"In groups of {FEWEST_CLASSES} classes or more, classes are drawn with their images; in smaller ones, images "
        f"of every class.",
    )
    return Block("bootstrap", f"Differences to {section.comparison.baseline} over classes and test images", notes,
                 ("recipe", *(heading(section, key) for key in section.measures)), tuple(rows))  # fmt: skip


def _image_cell(one: Difference) -> Cell:
    text = _interval_text(one.mean, one.over_images)
    return Cell(text, one.mean, one.over_images is not None and one.over_images.excludes_zero)


def _measures_block(report: Report, section: Section) -> Block | None:
    """Return calibration, the worst class and what else is measured."""
    columns = {
        "nll": ("NLL, nats", 1.0, 3), "ece": ("ECE, %", 100.0, 1), "worst": ("worst class, %", 100.0, 1),
        "balanced": ("balanced, %", 100.0, 1), "macro_f1": ("macro-F1, %", 100.0, 1), "top5": ("top-5, %", 100.0, 1),
    }  # fmt: skip
    if len(section.table.data.counts) <= _MOST_CLASSES_WITHOUT_TOP5:
        del columns["top5"]
    rows, which = [], report.which
    for row in section.table.rows:
        spreads = {key: row.spread(key, which) for key in columns}
        cells = [Cell(spread_text(spreads[key], scale, digits), spreads[key][0])
                 for key, (_, scale, digits) in columns.items()]  # fmt: skip
        rows.append((Cell(row.label), *cells))
    notes = ["NLL and expected calibration error (15 bins) are n/a where scores are no probabilities."]
    if any(not row.values("macro_f1", which) for row in section.table.rows):
        notes.append("Macro-F1 and top-5 need kept predictions (run.predictions).")
    return Block("measures", "Calibration and other measures", tuple(notes),
                 ("recipe", *(name for name, _, _ in columns.values())), tuple(rows))  # fmt: skip


def _cost_block(report: Report, section: Section) -> Block | None:
    """Return parameters, multiply-adds, hours, and the protocol that a row was trained by."""
    with_gpu = any(cost.gpu_hours for cost in section.costs.values())
    rows = []
    for row in section.table.rows:
        cost = section.costs[row.label]
        training = decimals(cost.training, 1e-12, 3) + (" and teachers" if cost.teachers else "")
        cells = [
            Cell(row.label),
            Cell("n/a" if cost.parameters is None else f"{cost.parameters:,}", cost.parameters),
            Cell(decimals(cost.inference, 1e-6, 1), cost.inference),
            Cell(training, cost.training),
            Cell(decimals(cost.worker_hours, 1.0, 3), cost.worker_hours),
            *([Cell(decimals(cost.gpu_hours, 1.0, 3), cost.gpu_hours)] if with_gpu else []),
            Cell(protocol(row)),
        ]
        rows.append(tuple(cells))
    headings = ("recipe", "parameters", "million multiply-adds per image", "training, 10^12 multiply-adds",
                "worker hours", *(["GPU hours"] if with_gpu else []), "protocol")  # fmt: skip
    notes = (
        "Multiply-adds are counted, those of training over all stages that lead to a result; hours are measured, of a "
        "whole run with all its final stages, mean over seeds; those of a stage that a run took over are its giver's.",
    )
    return Block("cost", "Cost and protocol", notes, headings, tuple(rows), (0, len(headings) - 1))


def protocol(row: Row) -> str:
    """Return how a row was trained, stage by stage: epochs, batch, learning rate, weight decay."""
    config, stages = row.config, stages_to(row.config, row.records[0].final)
    parts = []
    for name in stages:
        stage = config.method.stages[name]
        if not stage.epochs or stage.optimizer is None:
            continue
        optimizer = stage.optimizer
        parts.append(
            f"{stage.epochs} epochs, batch {stage.batch_size}, lr {optimizer.lr:g} {stage.lr_schedule.name}, "
            f"wd {optimizer.weight_decay:g}"
            if stage.lr_schedule is not None
            else f"{stage.epochs} epochs, batch {stage.batch_size}, lr {optimizer.lr:g}, wd {optimizer.weight_decay:g}"
        )
    return "; then ".join(parts) or "no steps"


def _chosen_block(report: Report, section: Section) -> Block | None:
    """Return the epoch that a split chose beside the last one; None where they are the same in every run."""
    models = [(row, model) for row in section.table.rows for model in row.models("best").values()]
    if all(model.values == row.models("last")[seed].values
           for row in section.table.rows for seed, model in row.models("best").items()):  # fmt: skip
        return None
    keys = [key for key in ("all", *BY_COUNT) if key in section.measures]
    rows = []
    for row in section.table.rows:
        own = [model for of, model in models if of is row]
        chosen = ", ".join(sorted({model.selected_on or "no choice" for model in own}))
        epochs = ", ".join(str(model.epoch) for model in own)
        cells = [Cell(spread_text(row.spread(key, "best")), row.spread(key, "best")[0]) for key in keys]
        rows.append((Cell(row.label), *cells, Cell(chosen), Cell(epochs)))
    headings = ("recipe", *(heading(section, key) for key in keys), "chosen on", "epochs")
    notes = ("An epoch chosen on test is optimistic; the last epoch is the honest number there.",)
    return Block("best", "The best epoch", notes, headings, tuple(rows), (0, len(headings) - 2, len(headings) - 1))


def _relative_block(report: Report, section: Section) -> Block | None:
    """Return relative accuracy, where there are references."""
    if not section.relative:
        return None
    rows = []
    for row in section.table.rows:
        found = section.relative.get(row.label)
        if found is None:
            continue
        spreads = [row.spread("all", report.which), found.vanilla, found.own, found.upper, found.relative]
        rows.append((Cell(row.label), *(Cell(spread_text(one), one[0]) for one in spreads)))
    notes = ("A_t on the long-tailed set; A_v of cross-entropy and A_b of the recipe itself on the balanced variant; "
             "A_u = max(A_v, A_b); A_r = A_t / A_u. All in %, of all test images.",)  # fmt: skip
    return Block("relative", "Relative accuracy", notes, ("recipe", "A_t", "A_v", "A_b", "A_u", "A_r"), tuple(rows))


def foot_lines(report: Report) -> Iterator[str]:
    """Yield a line for every row that is missing and every run that is left out, and why; see `unfinished_lines`."""
    for label, why in report.missing:
        yield f"missing: {label}: {why}"
    yield from unfinished_lines(report.left_out)
