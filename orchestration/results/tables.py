"""The final numbers of a run as plain text, the same on a terminal, in a pipe and in `report/table.txt`.

Accuracy and calibration of the ensemble, of whatever it is compared with, and of each expert; how many experts a router
asked; and how different the experts are.
The group columns come by two published rules, each named where it is used: by the number of training images of a class
(many > 100, medium 20 to 100, few < 20), and by the index of the class among the classes sorted by decreasing count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

GROUPS = ("many", "medium", "few")
_COUNT_RULE = {"many": "> 100", "medium": "20-100", "few": "< 20"}
_TEST_NAMES = ("test",)


def final_table(
    evaluations: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Any],
    *,
    title: str = "",
    seed: int | None = None,
) -> str:
    """Accuracy of the ensemble and of each expert, and how they differ, by class group, last and best side by side.

    Args:
        evaluations: "last" and "best", as in `evaluation/*.json`; either may be missing.
        data: as in `data.json`.
        title: what was trained, for the first line.
        seed: of the run; left out when None.

    Returns:
        Lines of text, the last one without a newline.
    """
    shown = {which: evaluations[which] for which in ("last", "best") if evaluations.get(which)}
    lines = [part for part in (title, _classes_line(data)) if part]
    if seed is not None:
        lines.append(f"seed {seed}, one run: no spread")
    lines += [f"{which}: {_moment(evaluation)}" for which, evaluation in shown.items()]
    if note := selection_note(shown.get("best")):
        lines.append(note)
    if not shown:
        return "\n".join([*lines, "no evaluation yet"])
    groups = data.get("groups") or {}
    lines += ["", "Top-1 accuracy in %, groups by number of training images of a class"]
    by_count = _headings(groups.get("by_count"), _COUNT_RULE)
    lines += _block(shown, _accuracy_rows(shown), by_count)
    by_index = [f"{group}_by_index" for group in GROUPS]
    if any(_top1(shown[w], member, key) is not None for w in shown for member in members(shown) for key in by_index):
        lines += ["", "Top-1 accuracy in %, groups by index of the class, classes sorted by falling training count"]
        headings = _headings(groups.get("by_index"), _index_rule(groups.get("by_index")), "_by_index")
        lines += _block(shown, _accuracy_rows(shown), {key: headings[key] for key in by_index})
    lines += ["", "Calibration: negative log-likelihood in nats, expected calibration error in % (15 bins)"]
    rows = []
    for member in members(shown):
        cells = [number(_member(shown[w], member).get("nll"), 1.0, 4) for w in shown]
        rows.append([member, *cells, *(number(_member(shown[w], member).get("ece"), 100.0, 2) for w in shown)])
    lines += grid([["", *(f"NLL {w}" for w in shown), *(f"ECE {w}" for w in shown)], *rows])
    if rows_per_image := _per_image_rows(shown):
        lines += ["", "Per image, groups by number of training images of a class"]
        lines += _block(shown, rows_per_image, by_count)
    if rows_diversity := _diversity_rows(shown):
        lines += ["", "How different the experts are, groups by number of training images of a class"]
        lines += _block(shown, rows_diversity, by_count)
        lines.append("bias: the class that most experts say is wrong; variance: an expert does not say that class")
    return "\n".join(line.rstrip() for line in lines)


def selection_note(best: Mapping[str, Any] | None) -> str:
    """How "best" was chosen, in words that cannot be missed when it was chosen on the test set."""
    if not best or not best.get("selected_on"):
        return ""
    split = str(best["selected_on"])
    if split in _TEST_NAMES:
        return "best was chosen on TEST: optimistic, for comparison with papers that do so; last is the honest number"
    if split == best.get("split", "test"):
        return f"best was chosen on {split}, which is also what is shown here"
    return f"best was chosen on {split}; {best.get('split', 'test')} was not looked at"


def members(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of an evaluation's members, the ensemble first."""
    names = {name: None for evaluation in evaluations.values() for name in evaluation.get("members", {})}
    return sorted(names, key=lambda name: name != "ensemble")


def per_class_table(evaluations: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Accuracy of every class as one table, in the split orientation of pandas and MLflow.

    Returns:
        `columns` and `data`, one row a class: id, name, training images, both groups, then one fraction (or None) for
        each evaluation and member.
    """
    counts = data.get("counts", [])
    names = data.get("class_names") or [str(index) for index in range(len(counts))]
    by_class: dict[str, dict[int, str]] = {}
    for rule, groups in (data.get("groups") or {}).items():
        by_class[rule] = {int(index): group for group, ids in (groups or {}).items() for index in ids}
    columns = ["class", "name", "train_images", *(f"group_{rule}" for rule in by_class)]
    accuracies = []
    for which, evaluation in evaluations.items():
        for member in members({which: evaluation}):
            columns.append(f"{which}/{member}")
            accuracies.append(_member(evaluation, member).get("per_class") or [None] * len(counts))
    rows = []
    for index, count in enumerate(counts):
        groups_of = [groups.get(index) for groups in by_class.values()]
        rows.append([index, names[index], count, *groups_of, *(accuracy[index] for accuracy in accuracies)])
    return {"columns": columns, "data": rows}


def _classes_line(data: Mapping[str, Any]) -> str:
    counts = data.get("counts") or []
    if not counts:
        return ""
    most, least = max(counts), min(counts)
    ratio = f"{most / least:.4g}" if least else "undefined"
    left_out = len(data.get("left_out") or [])
    without = f"; {left_out:,} unreadable image{'s' if left_out > 1 else ''} left out" if left_out else ""
    return (
        f"{data.get('dataset', 'data')}: {sum(counts):,} training images of {len(counts):,} classes, "
        f"{most:,} to {least:,} a class (ratio {ratio}){without}"
    )


def _moment(evaluation: Mapping[str, Any]) -> str:
    where = [f"{key} {evaluation[key]}" for key in ("stage", "epoch", "step") if evaluation.get(key) is not None]
    images = evaluation.get("num_images")
    on = f"measured on {evaluation.get('split', 'an unnamed split')}" + (f" ({images:,} images)" if images else "")
    return ", ".join([*where, on])


def _headings(groups: Mapping[str, Sequence[int]] | None, rule: Mapping[str, str], suffix: str = "") -> dict[str, str]:
    found = {"all": "all"}
    for group in GROUPS:
        size = f"{len(groups.get(group, ())):,}" if groups else "?"
        found[group + suffix] = f"{group} {rule.get(group, '')}".strip() + f" [{size}]"
    return found


def _index_rule(groups: Mapping[str, Sequence[int]] | None) -> dict[str, str]:
    rule, start = {}, 0
    for group in GROUPS if groups else ():
        size = len((groups or {}).get(group, ()))
        rule[group] = f"{start}-{start + size - 1}" if size else ""
        start += size
    return rule


class _Row(NamedTuple):
    """A row of a block: how it is shown, and an evaluation's numbers by group."""

    label: str
    scale: float
    digits: int
    by_group: Callable[[Mapping[str, Any]], Mapping[str, float | None]]


def _block(shown: Mapping[str, Mapping[str, Any]], rows: Sequence[_Row], headings: Mapping[str, str]) -> list[str]:
    """Rows over the groups that the headings name, each group's evaluations side by side."""
    head = ["", *(heading for heading in headings.values() for _ in shown)]
    second = ["", *(which for _ in headings for which in shown)]
    cells = [
        [
            row.label,
            *(number(row.by_group(shown[w]).get(group), row.scale, row.digits) for group in headings for w in shown),
        ]
        for row in rows
    ]
    return grid([second, *cells], spans=_spans(head, len(shown)))


def _accuracy_rows(shown: Mapping[str, Mapping[str, Any]]) -> list[_Row]:
    def top1(member: str) -> Callable[[Mapping[str, Any]], Mapping[str, float | None]]:
        return lambda evaluation: _member(evaluation, member).get("top1") or {}

    return [_Row(member, 100.0, 2, top1(member)) for member in members(shown)]


def _per_image_rows(shown: Mapping[str, Mapping[str, Any]]) -> list[_Row]:
    """Every extra number, and for a router the share of expert passes that it saved; none where there is none."""
    found = dict.fromkeys(name for evaluation in shown.values() for name in evaluation.get("per_image") or {})

    def mean(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, float | None]]:
        return lambda evaluation: (evaluation.get("per_image") or {}).get(name) or {}

    rows = [_Row(name.replace("_", " "), 1.0, 3, mean(name)) for name in found]
    if any(map(passes_saved, shown.values())):
        rows.append(_Row("expert passes saved, %", 100.0, 2, passes_saved))
    return rows


def passes_saved(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """Share of the experts' forward passes that a router did without, by group; the trunk always runs.

    Empty where there was no router or the number of experts is not noted.
    """
    used = (evaluation.get("per_image") or {}).get("experts_used") or {}
    num_experts = (evaluation.get("diversity") or {}).get("num_experts")
    if not num_experts:
        return {}
    return {group: None if mean is None else 1 - mean / num_experts for group, mean in used.items()}


def several_experts(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The evaluation's `diversity`; empty where there is none, or one expert, which differs from nobody."""
    diversity = evaluation.get("diversity") or {}
    return diversity if diversity.get("num_experts", 0) > 1 else {}


def _diversity_rows(shown: Mapping[str, Mapping[str, Any]]) -> list[_Row]:
    experts = dict.fromkeys(name for e in shown.values() for name in several_experts(e).get("experts", ()))
    if not experts:
        return []

    def value(key: str) -> Callable[[Mapping[str, Any]], Mapping[str, float | None]]:
        return lambda evaluation: several_experts(evaluation).get(key) or {}

    def divergence(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, float | None]]:
        return lambda evaluation: (several_experts(evaluation).get("divergence") or {}).get(name) or {}

    return [
        _Row("pairs that disagree, %", 100.0, 2, value("disagreement")),
        _Row("all agree, %", 100.0, 2, value("agreement")),
        *(_Row(f"KL(mean || {name}), nats", 1.0, 4, divergence(name)) for name in experts),
        _Row("error of an expert, %", 100.0, 2, value("error")),
        _Row("bias, %", 100.0, 2, value("bias")),
        _Row("variance, %", 100.0, 2, value("variance")),
    ]


def _spans(head: Sequence[str], width: int) -> list[tuple[str, int]]:
    return [(head[0], 1), *((head[start], width) for start in range(1, len(head), width))]


def grid(rows: Sequence[Sequence[str]], spans: Iterable[tuple[str, int]] = ()) -> list[str]:
    """Right-aligned columns two spaces apart, the first left-aligned; spans head several columns at once."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    position, spans = 0, list(spans)
    for text, width in spans:
        columns = range(position, position + width)
        lack = len(text) - sum(widths[column] for column in columns) - 2 * (width - 1)
        for extra in range(max(lack, 0)):
            widths[columns[-1 - extra % width]] += 1
        position += width
    lines = []
    if spans:
        cells, position = [], 0
        for text, width in spans:
            room = sum(widths[position : position + width]) + 2 * (width - 1)
            cells.append(text.rjust(room) if position else text.ljust(room))
            position += width
        lines.append("  ".join(cells))
    head, *body = (
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return [*lines, head, "-" * len(head), *body]


def _member(evaluation: Mapping[str, Any], member: str) -> Mapping[str, Any]:
    return evaluation.get("members", {}).get(member) or {}


def _top1(evaluation: Mapping[str, Any], member: str, key: str) -> float | None:
    return (_member(evaluation, member).get("top1") or {}).get(key)


def number(value: float | None, scale: float, digits: int) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value * scale:.{digits}f}"
