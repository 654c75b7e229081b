"""Differences of rows to a baseline, with intervals, and the words that may be said of them.

Two intervals are computed (statistics.py): Student's over seeds, of the differences paired by seed, and a bootstrap
over classes and test images of the mean difference over these seeds, where both rows kept their predictions.

The words follow from both, so that neither kind of chance passes as a result:
  "real at 95 %"                          each interval that there is excludes 0, and that over seeds is there
  "not told apart by n seeds"             the interval over seeds includes 0, or two seeds differ by the same number
  "not told apart by the test images"     that over seeds excludes 0, the bootstrap does not
  "one seed: no interval"                 a single seed in common: training again may give another order

The interval over seeds decides first, because training again is what a reader would do. With 3 seeds it has 2 degrees
of freedom and is 2.5 standard deviations wide to each side, with 5 seeds 1.2. A recipe of three seeds or more that all
give the same number (an accuracy of 0) has no spread; its interval is that number. Each difference is judged alone: of
100 that are none, up to 5 will be called real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregation.predictions import Predictions
from orchestration.reports.records import BY_COUNT, BY_INDEX, ENSEMBLE, Model
from orchestration.reports.rows import Row, Table
from orchestration.reports.statistics import Interval, bootstrap, paired_interval

COMPARED = ("all", *BY_COUNT, *BY_INDEX)
REAL = "real at 95 %"


@dataclass(frozen=True)
class Difference:
    """The difference of a row to the baseline in one measure, as a fraction.

    Attributes:
        mean: over the seeds that both have.
        seeds: how many these are.
        over_seeds: Student's interval; None with one seed, and of two equal differences.
        over_images: the bootstrap's; None where a run kept no predictions.
        words: what may be said.
    """

    mean: float
    seeds: int
    over_seeds: Interval | None
    over_images: Interval | None
    words: str

    @property
    def real(self) -> bool:
        return self.words == REAL


@dataclass(frozen=True)
class Comparison:
    """Differences of all rows of a table to one of them.

    Attributes:
        baseline: label of that row.
        differences: by label, then by measure of `COMPARED`; no entry for the baseline, and none for a measure that
            either has not, or for no seed that both have.
        remarks: runs whose predictions could not be used, and why.
    """

    baseline: str
    differences: Mapping[str, Mapping[str, Difference]]
    remarks: tuple[str, ...]


def baseline_of(table: Table, asked: str | None) -> str | None:
    """Return the label of a table's baseline: the row asked for, else the first; None where it has no such row.

    Args:
        table: the rows.
        asked: a label, or words of a study's recipe such as `method=ce mix=none`. Of several final stages of that
            recipe the first is taken.
    """
    return table.rows[0].label if asked is None else next(_named(table, asked), None)


def _named(table: Table, asked: str) -> Iterator[str]:
    """Yield labels of rows that are meant by a label or by words, the surest first."""
    yield from (row.label for row in table.rows if row.label == asked)
    pairs = dict(word.partition("=")[::2] for word in asked.split()) if "=" in asked else {}
    for row in table.rows:
        label = row.records[0].label or {}
        if pairs and pairs.items() <= label.items():
            yield row.label
    name = asked.removeprefix("method=")
    yield from (row.label for row in table.rows if row.label == name)
    yield from (row.label for row in table.rows if row.records[0].stage and row.label.startswith(f"{name}+"))


def compare(table: Table, baseline: str, which: str = "last", *, draws: int | None = None) -> Comparison:
    """Compare every row of a table with one of them.

    Args:
        table: the rows.
        baseline: label of the row to compare with.
        which: "last" or "best", the models to compare.
        draws: of the bootstrap; None for the usual number.
    """
    base = table.row(baseline)
    assert base is not None
    others = [row for row in table.rows if row is not base]
    images, remarks = _over_images(table, base, others, which, draws)
    found: dict[str, dict[str, Difference]] = {}
    for row in others:
        over = images.get(row.label, {})
        own = {key: _over_seeds(row, base, key, which, over.get(key)) for key in COMPARED}
        found[row.label] = {key: one for key, one in own.items() if one is not None}
    return Comparison(baseline, found, tuple(remarks))


def compare_two(table: Table, row: Row, other: Row, key: str, which: str = "last") -> Difference | None:
    """Return the difference of a row to another in one measure; None where they have no seed in common.

    The bootstrap is drawn only where the seeds tell them apart: elsewhere it changes no word.
    """
    seeds_alone = _over_seeds(row, other, key, which, None)
    if seeds_alone is None or not seeds_alone.real:
        return seeds_alone
    images, _ = _over_images(table, other, [row], which, None)
    return _over_seeds(row, other, key, which, images.get(row.label, {}).get(key))


def _over_seeds(row: Row, base: Row, key: str, which: str, over_images: Interval | None) -> Difference | None:
    """Return the difference over the seeds that both rows have; None without one."""
    ours, theirs = row.values(key, which), base.values(key, which)
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    number, over_seeds = len(differences), paired_interval(differences)
    words = verdict(number, over_seeds, over_images)
    return Difference(float(np.mean(differences)), number, over_seeds, over_images, words)


def verdict(seeds: int, over_seeds: Interval | None, over_images: Interval | None) -> str:
    """Return the words that may be said of a difference; see the head of this file."""
    if seeds == 1:
        return "one seed: no interval"
    if over_seeds is None or not over_seeds.excludes_zero:
        return f"not told apart by {seeds} seeds"
    if over_images is not None and not over_images.excludes_zero:
        return "not told apart by the test images"
    return REAL


def _over_images(
    table: Table, base: Row, others: Sequence[Row], which: str, draws: int | None
) -> tuple[dict[str, dict[str, Interval]], list[str]]:
    """Return the bootstrap's intervals by label and measure, and remarks.

    Rows that share the same seeds with the baseline are drawn together. One array of differences is kept for each row,
    8 bytes per test image: 16 MB for 40 rows and 50,000 images.
    """
    remarks: list[str] = []
    kept: dict[int, _Right | None] = {}

    def of_base(seed: int, model: Model) -> _Right | None:
        if seed not in kept:
            kept[seed] = _right(model, remarks)
        return kept[seed]

    labels_N: NDArray[np.int64] | None = None
    columns: dict[str, NDArray[np.float64]] = {}
    theirs = base.models(which)
    for row in others:
        ours = row.models(which)
        column = _mean_difference(ours, theirs, of_base, remarks)
        if column is None:
            continue
        labels, values = column
        if labels_N is None:
            labels_N = labels
        if not np.array_equal(labels_N, labels):
            remarks.append(f"{row.label}: its predictions are of other test images; no bootstrap")
            continue
        columns[row.label] = values
    if labels_N is None:
        return {}, remarks

    found: dict[str, dict[str, Interval]] = {label: {} for label in columns}
    values_NR = np.stack(list(columns.values()), axis=1)
    more = {} if draws is None else {"draws": draws}
    for keys in (BY_COUNT, BY_INDEX):
        groups = {key: table.data.groups[key] for key in keys if key in table.data.groups}
        if not groups:
            continue
        for key, intervals in bootstrap(values_NR, labels_N, groups, **more).items():
            for label, interval in zip(columns, intervals, strict=True):
                found[label].setdefault(key, interval)
    return found, remarks


class _Right:
    """Labels of the test images, and whether each was predicted right."""

    def __init__(self, model: Model) -> None:
        assert model.predictions is not None
        kept = Predictions.read(model.predictions, logits=False)
        self.labels_N = kept.labels_N
        self.right_N = kept.rank_MN[kept.names.index(ENSEMBLE)] == 0


def _right(model: Model, remarks: list[str]) -> _Right | None:
    """Read what a model says of every image; None where nothing was kept, or with a remark where it cannot be used."""
    if model.predictions is None:
        return None
    try:
        found = _Right(model)
    except ValueError as problem:
        remarks.append(str(problem))
        return None
    if abs(float(found.right_N.mean()) - (model.values["all"] or 0.0)) > 1e-6:
        remarks.append(f"{model.predictions}: not the predictions of its evaluation, accuracies differ; no bootstrap")
        return None
    return found


def _mean_difference(
    ours: Mapping[int, Model],
    theirs: Mapping[int, Model],
    of_base: Callable[[int, Model], _Right | None],
    remarks: list[str],
) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Return the labels and the mean difference of each image over the seeds that both have; None without all files."""
    seeds = [seed for seed in ours if seed in theirs]
    total: NDArray[np.float64] | None = None
    labels: NDArray[np.int64] | None = None
    for seed in seeds:
        a, b = _right(ours[seed], remarks), of_base(seed, theirs[seed])
        if a is None or b is None or not np.array_equal(a.labels_N, b.labels_N):
            return None
        one = a.right_N.astype(np.float64) - b.right_N
        total = one if total is None else total + one
        labels = a.labels_N
    return None if total is None or labels is None else (labels, total / len(seeds))
