"""`expertail evaluate`: measure a saved run again."""

from __future__ import annotations

from typing import Any

import torch

from aggregation.diversity import Diversity
from aggregation.metrics import Scores
from orchestration.results.run_table import table
from orchestration.results.saved_run import (
    SavedRun,
    keep,
    open_run,
    threads_of,
)


def reevaluate(run: str, which: str | None, split: str, overrides: list[str]) -> str:
    """Score the ensemble and its experts on a split, and keep the result as evaluation/again-<which>-<split>.json.

    Args:
        run: the run folder.
        which: "best" or "last", of its models; None for both.
        split: "test" or "val".
        overrides: `a.b=value` for keys of MAY_DIFFER.

    Returns:
        The table that training prints, for these evaluations alone, and where they were kept.

    Raises:
        ValueError: there is no such run, it has no model yet, a file is damaged, an override would change what is
            measured, or the data is not the run's.
    """
    shown, kept = {}, []
    for name in ("last", "best") if which is None else (which,):
        saved = open_run(run, name, split, overrides)
        with threads_of(saved.config):
            evaluation = saved.moment() | _score(saved)
        shown[name] = _shown(evaluation)
        kept.append(keep(saved.folder, f"again-{name}-{split}", evaluation))
    return "\n".join([table(saved.config, saved.data, shown), "", *kept])


@torch.no_grad()
def _score(saved: SavedRun) -> dict[str, Any]:
    """As `StageTrainer.evaluate` on one worker."""
    model, names = saved.model, saved.model.description.expert_names
    scores, diversity = Scores(), Diversity()
    for images_B3HW, labels_B in saved.batches():
        outputs = saved.outputs(images_B3HW)
        experts = dict(zip(names, outputs.logits_EBC.unbind(), strict=True))
        used_B = model.aggregator.experts_used(outputs)
        extra = {} if used_B is None else {"experts_used": used_B}
        scores.update({**model.aggregator.members(outputs), **experts}, labels_B, extra)
        diversity.update(experts, labels_B)
    counts = saved.data["counts"]
    return {**scores.result(counts, saved.cuts), "diversity": diversity.result(counts, saved.cuts)}


def _shown(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Without the word on selection where it would claim that the split was not looked at."""
    same = evaluation["selected_on"] == evaluation["split"] == "val"
    return {key: value for key, value in evaluation.items() if not (same and key == "selected_on")}
