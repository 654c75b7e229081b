"""The table that `expertail train` and `expertail evaluate` print: the final numbers and the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestration.config.identity import published
from orchestration.config.late import late_notes
from orchestration.config.run_config import RunConfig
from orchestration.results.finals_table import Evaluations, report_table
from orchestration.results.text import plural


def run_table(
    config: RunConfig,
    data: dict[str, Any],
    evaluations: Evaluations,
    finals: Mapping[str, Evaluations] | None = None,
) -> str:
    """Return the final table of a run; below it what its stages never reached, and the published result, if any.

    Args:
        config: the run's.
        data: as in `data.json`.
        evaluations: "last" and "best", as in `evaluation/*.json`; either may be missing.
        finals: the evaluations of every final stage, where the recipe has several.
    """
    backbone = f"{config.backbone.name} {config.backbone.depth}"
    experts = plural(config.method.num_experts, "expert")
    title = ", ".join([config.method.name, experts, backbone, config.dataset.name, *config.engine.differences])
    text = report_table(evaluations, finals or {}, data, title=title, seed=config.seed)
    line = published(config)
    return "\n".join([text, *late_notes(config.method), *([line] if line else [])])
