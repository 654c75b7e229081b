"""The final numbers of a run as plain text, the same on a terminal, in a pipe and in `report/table.txt`.

It shows accuracy and calibration of the ensemble, of whatever it is compared with, and of each expert; how many experts
a router asked; and how different the experts are.

Classes are grouped by two published rules, each named where it is used: by their number of training images (many > 100,
medium 20 to 100, few < 20), and by their index among the classes sorted by decreasing count. Papers use either, so a
number is comparable only with numbers under the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from orchestration.results.text import decimals, plural, text_table

CLASS_GROUPS = ("many", "medium", "few")
_COUNT_RULE = {"many": "> 100", "medium": "20-100", "few": "< 20"}
_TEST_NAMES = ("test",)  # splits on which a model should not be chosen


def final_table(
    evaluations: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Any],
    *,
    title: str = "",
    seed: int | None = None,
) -> str:
    """Return accuracy, calibration and diversity of ensemble and experts by class group, last and best side by side.

    Args:
        evaluations: "last" and "best", as in `evaluation/*.json`; either may be missing.
        data: as in `data.json`.
        title: the first line: method, experts, dataset.
        seed: the run's; None leaves its line out.

    Returns:
        Lines of text, the last one without a newline.
    """
    return "\n".join([*head_lines(data, title=title, seed=seed), *detail_lines(evaluations, data)])


def head_lines(data: Mapping[str, Any], *, title: str = "", seed: int | None = None) -> list[str]:
    """Return the lines that say what was trained on what; arguments as for `final_table`."""
    lines = [part for part in (title, _classes_line(data)) if part]
    lines += [remark["text"] for remark in data.get("remarks") or ()]
    return [*lines, f"seed {seed}, one run: no spread"] if seed is not None else lines


def detail_lines(evaluations: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any]) -> list[str]:
    """Return the lines of `final_table` that come from the evaluations."""
    shown = {which: evaluations[which] for which in ("last", "best") if evaluations.get(which)}
    lines = [f"{which}: {_origin(evaluation)}" for which, evaluation in shown.items()]
    if note := selection_note(shown.get("best")):
        lines.append(note)
    if not shown:
        return [*lines, "no evaluation yet"]

    by_count, *others = groupings(data, list(shown.values()))
    for rule, headings in (by_count, *others):
        lines += ["", f"Top-1 accuracy in %, classes grouped by {rule}"]
        lines += _block(shown, _accuracy_rows(shown), headings)

    lines += ["", "Calibration: negative log-likelihood in nats, expected calibration error in % (15 bins)"]
    rows = []
    for member in members(shown):
        cells = [decimals(_member(shown[w], member).get("nll"), 1.0, 4) for w in shown]
        rows.append([member, *cells, *(decimals(_member(shown[w], member).get("ece"), 100.0, 2) for w in shown)])
    lines += text_table([["", *(f"NLL {w}" for w in shown), *(f"ECE {w}" for w in shown)], *rows], rule=True)

    if rows_per_image := _per_image_rows(shown):
        lines += ["", "Per image, classes grouped by number of training images"]
        lines += _block(shown, rows_per_image, by_count.headings)
    if rows_diversity := _diversity_rows(shown):
        lines += ["", "How different the experts are, classes grouped by number of training images"]
        lines += _block(shown, rows_diversity, by_count.headings)
        lines.append("bias: the experts' majority vote is wrong; variance: an expert differs from the majority vote")
    return lines


class Grouping(NamedTuple):
    """One of the published rules that group classes: in words, and a heading for each key of an evaluation."""

    rule: str
    headings: dict[str, str]


def groupings(data: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> list[Grouping]:
    """Return the rules that group the classes of these evaluations; by number of training images comes first.

    Args:
        data: as in `data.json`.
        evaluations: as in `evaluation/*.json`.
    """
    groups = data.get("groups") or {}
    found = [Grouping("number of training images", _headings(groups.get("by_count"), _COUNT_RULE))]
    # Evaluations hold the keys by index for every data set; they are None where it has no cuts by index.
    by_index = [f"{group}_by_index" for group in CLASS_GROUPS]
    if any(top1(e, key, member) is not None for e in evaluations for member in members({"": e}) for key in by_index):
        headings = _headings(groups.get("by_index"), _index_rule(groups.get("by_index")), "_by_index")
        found.append(Grouping("index, sorted by falling training count", {key: headings[key] for key in by_index}))
    return found


def selection_note(best: Mapping[str, Any] | None) -> str:
    """Say how "best" was chosen, in words that cannot be missed when it was chosen on the test set."""
    if not best or not best.get("selected_on"):
        return ""
    split = str(best["selected_on"])
    if split in _TEST_NAMES:
        return "best was chosen on TEST: optimistic, for comparison with papers that do so; last is the honest number"
    if split == best.get("split", "test"):
        return f"best was chosen on {split}, which is also what is shown here"
    return f"best was chosen on {split}; {best.get('split', 'test')} was not used"


def members(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of all members, the ensemble first."""
    names = {name: None for evaluation in evaluations.values() for name in evaluation.get("members", {})}
    return sorted(names, key=lambda name: name != "ensemble")


def shown_members(values: Mapping[str, Any]) -> list[str]:
    """Return the names of members worth a line, the ensemble first: one expert with equal values is the ensemble.

    Args:
        values: what would be shown, by member.
    """
    names = sorted(values, key=lambda name: name != "ensemble")
    return names[:1] if len(names) == 2 and values[names[0]] == values[names[1]] else names


def per_class_table(evaluations: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the accuracy of every class as one table, in the split orientation of pandas and MLflow.

    Returns:
        `columns` and `data`, one row per class: id, name, training images, both groups, then one fraction (or None)
        for each evaluation and member.
    """
    counts = data.get("counts", [])
    names = data.get("class_names") or [str(index) for index in range(len(counts))]

    # JSON holds the classes of each group; the table needs the group of each class.
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
    without = f"; {plural(left_out, 'unreadable image')} left out" if left_out else ""
    return (
        f"{data.get('dataset', 'data')}: {sum(counts):,} training images of {len(counts):,} classes, "
        f"{most:,} to {least:,} per class (ratio {ratio}){without}"
    )


def _origin(evaluation: Mapping[str, Any]) -> str:
    """Return the stage, epoch and step that an evaluation measured, and the split it was measured on."""
    where = [f"{key} {evaluation[key]}" for key in ("stage", "epoch", "step") if evaluation.get(key) is not None]
    images = evaluation.get("num_images")
    on = f"measured on {evaluation.get('split', 'an unnamed split')}" + (f" ({images:,} images)" if images else "")
    return ", ".join([*where, on])


def _headings(groups: Mapping[str, Sequence[int]] | None, rule: Mapping[str, str], suffix: str = "") -> dict[str, str]:
    """Return a heading for each key of the groups: its name, its rule and its number of classes."""
    found = {"all": "all"}
    for group in CLASS_GROUPS:
        size = f"{len(groups.get(group, ())):,}" if groups else "?"
        found[group + suffix] = f"{group} {rule.get(group, '')}".strip() + f" [{size}]"
    return found


def _index_rule(groups: Mapping[str, Sequence[int]] | None) -> dict[str, str]:
    """Return the range of class indices of each group, classes sorted by decreasing count."""
    rule, start = {}, 0
    for group in CLASS_GROUPS if groups else ():
        size = len((groups or {}).get(group, ()))
        rule[group] = f"{start}-{start + size - 1}" if size else ""
        start += size
    return rule


class _Row(NamedTuple):
    """A row of a block: its label, its unit (scale, digits), and how to take its numbers from an evaluation."""

    label: str
    scale: float
    digits: int
    by_group: Callable[[Mapping[str, Any]], Mapping[str, float | None]]


def _block(shown: Mapping[str, Mapping[str, Any]], rows: Sequence[_Row], headings: Mapping[str, str]) -> list[str]:
    """Lay out rows under the headings of groups; each group has a column for every evaluation shown."""
    names = ["", *(which for _ in headings for which in shown)]
    cells = [
        [
            row.label,
            *(decimals(row.by_group(shown[w]).get(group), row.scale, row.digits) for group in headings for w in shown),
        ]
        for row in rows
    ]
    spans = [("", 1), *((heading, len(shown)) for heading in headings.values())]
    return text_table([names, *cells], rule=True, spans=spans)


def _accuracy_rows(shown: Mapping[str, Mapping[str, Any]]) -> list[_Row]:
    def by_group(member: str) -> Callable[[Mapping[str, Any]], Mapping[str, float | None]]:
        return lambda evaluation: _member(evaluation, member).get("top1") or {}

    return [_Row(member, 100.0, 2, by_group(member)) for member in members(shown)]


def _per_image_rows(shown: Mapping[str, Mapping[str, Any]]) -> list[_Row]:
    """Return a row for every extra number per image, and for a router one for the expert passes that it saved."""
    found = dict.fromkeys(name for evaluation in shown.values() for name in evaluation.get("per_image") or {})

    def mean(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, float | None]]:
        return lambda evaluation: (evaluation.get("per_image") or {}).get(name) or {}

    rows = [_Row(name.replace("_", " "), 1.0, 3, mean(name)) for name in found]
    if any(map(passes_saved, shown.values())):
        rows.append(_Row("expert passes saved, %", 100.0, 2, passes_saved))
    return rows


def passes_saved(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the share of the experts' forward passes that a router saved, by group; the trunk always runs.

    The result is empty where there was no router, or where the evaluation does not hold the number of experts.
    """
    used = (evaluation.get("per_image") or {}).get("experts_used") or {}
    num_experts = (evaluation.get("diversity") or {}).get("num_experts")
    if not num_experts:  # an evaluation of an older version
        return {}
    return {group: None if mean is None else 1 - mean / num_experts for group, mean in used.items()}


def diversity_of(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the evaluation's `diversity`; empty where it holds none, or only one expert."""
    diversity = evaluation.get("diversity") or {}
    return diversity if diversity.get("num_experts", 0) > 1 else {}


def _diversity_rows(shown: Mapping[str, Mapping[str, Any]]) -> list[_Row]:
    experts = dict.fromkeys(name for e in shown.values() for name in diversity_of(e).get("experts", ()))
    if not experts:
        return []

    def value(key: str) -> Callable[[Mapping[str, Any]], Mapping[str, float | None]]:
        return lambda evaluation: diversity_of(evaluation).get(key) or {}

    def divergence(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, float | None]]:
        return lambda evaluation: (diversity_of(evaluation).get("divergence") or {}).get(name) or {}

    return [
        _Row("pairs that disagree, %", 100.0, 2, value("disagreement")),
        _Row("all agree, %", 100.0, 2, value("agreement")),
        *(_Row(f"KL(mean || {name}), nats", 1.0, 4, divergence(name)) for name in experts),
        _Row("error of an expert, %", 100.0, 2, value("error")),
        _Row("bias, %", 100.0, 2, value("bias")),
        _Row("variance, %", 100.0, 2, value("variance")),
    ]


def _member(evaluation: Mapping[str, Any], member: str) -> Mapping[str, Any]:
    return evaluation.get("members", {}).get(member) or {}


def top1(evaluation: Mapping[str, Any], key: str, member: str = "ensemble") -> float | None:
    """Return a member's accuracy in one group of classes; None where it is missing or the group is empty."""
    return (_member(evaluation, member).get("top1") or {}).get(key)
