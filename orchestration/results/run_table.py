"""What a run leaves behind: served models, pictures, the final table. Everything from the run folder alone."""

from __future__ import annotations

from typing import Any

from orchestration.config.identity import published
from orchestration.config.run_config import RunConfig
from orchestration.results.tables import final_table


def table(config: RunConfig, data: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> str:
    """The final table, with what was published for this recipe under it."""
    title = (
        f"{config.method.name}, {config.method.num_experts} expert{'s' if config.method.num_experts > 1 else ''}, "
        f"{config.backbone.name} {config.backbone.depth}, {config.dataset.name}"
    )
    text = final_table(evaluations, data, title=title, seed=config.seed)
    line = published(config)
    return f"{text}\n{line}" if line else text
