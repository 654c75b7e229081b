"""The text report of a run: for one result its final table, for several final stages a comparison and then each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestration.results.fitted_table import choices, fitted_lines
from orchestration.results.tables import detail_lines, groupings, head_lines, selection_note, top1
from orchestration.results.text import decimals, text_table

Evaluations = Mapping[str, Mapping[str, Any]]
""" "last" and "best", as in `evaluation/*.json`; either may be missing."""

_SAME = "no steps, so last and best are the same model"


def report_table(
    found: Evaluations,
    finals: Mapping[str, Evaluations],
    data: Mapping[str, Any],
    *,
    title: str = "",
    seed: int | None = None,
) -> str:
    """Return the report of a run as text.

    Args:
        found: the run's evaluations, shown where there are no `finals`.
        finals: those of every final stage, where the recipe has several; of one alone there is nothing to compare.
        data: as in `data.json`.
        title: the first line: method, experts, dataset.
        seed: the run's; None leaves its line out.

    Returns:
        Lines of text, the last one without a newline.
    """
    if len(finals) == 1:  # the others are not trained yet, or were not measured
        (found,), finals = finals.values(), {}
    chosen = fitted_lines(choices(found, finals))
    if not finals:
        shown = distinct(found)
        same = [] if shown is found else [f"{found['last'].get('stage', 'last stage')}: {_SAME}"]
        return "\n".join([*head_lines(data, title=title, seed=seed), *same, *detail_lines(shown, data), *chosen])
    lines = [*head_lines(data, title=title, seed=seed), *_comparison(finals, data), *chosen]
    for stage, evaluations in finals.items():
        lines += ["", f"== {stage} ==", *detail_lines(distinct(evaluations), data)]
    return "\n".join(line.rstrip() for line in lines)


def distinct(evaluations: Evaluations) -> Evaluations:
    """Return the evaluations without "best" where the stage has no steps: there it is the same model as "last"."""
    if "last" in evaluations and (evaluations.get("best") or {}).get("step") == 0:
        return {"last": evaluations["last"]}
    return evaluations


def _shown_models(finals: Mapping[str, Evaluations]) -> list[str]:
    """Return those of "last" and "best" that any of the stages has."""
    return [which for which in ("last", "best") if any(evaluations.get(which) for evaluations in finals.values())]


def _comparison(finals: Mapping[str, Evaluations], data: Mapping[str, Any]) -> list[str]:
    """Return a row per final stage: accuracy of the ensemble by group, and its calibration."""
    which = _shown_models(finals)
    everything = [evaluation for evaluations in finals.values() for evaluation in evaluations.values()]
    lines = [f"final stages: {', '.join(finals)}; below the comparison, each with its details", *_notes(finals)]
    for place, (rule, headings) in enumerate(groupings(data, everything)):
        ece = [] if place else ["ECE"]
        spans = [("", 1), *((heading, len(which)) for heading in [*headings.values(), *ece])]
        rows = [["", *(w for _ in spans[1:] for w in which)]]
        for stage, evaluations in finals.items():
            own = [evaluations.get(w) or {} for w in which]
            cells = [decimals(top1(evaluation, key), 100.0, 2) for key in headings for evaluation in own]
            rows.append([stage, *cells, *(decimals(_ece(evaluation), 100.0, 2) for _ in ece for evaluation in own)])
        also = "; expected calibration error (ECE) in %" if ece else ""
        lines += ["", f"Top-1 accuracy of the ensemble in %, classes grouped by {rule}{also}"]
        lines += text_table(rows, rule=True, spans=spans)
    return lines


def _notes(finals: Mapping[str, Evaluations]) -> list[str]:
    """Say how "best" was chosen, once for all stages of which that is the same."""
    stages: dict[str, list[str]] = {}
    for stage, evaluations in finals.items():
        note = selection_note(evaluations.get("best"))
        if not note and "best" in evaluations and "best" not in distinct(evaluations):
            note = _SAME
        stages.setdefault(note, []).append(stage)
    return [f"{', '.join(of)}: {note}" for note, of in stages.items() if note]


def _ece(evaluation: Mapping[str, Any]) -> float | None:
    return (evaluation.get("members", {}).get("ensemble") or {}).get("ece")
