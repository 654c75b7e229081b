"""What a run leaves behind: served models, pictures, the final table. Everything from the run folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestration.checkpoint import verify
from orchestration.config.identity import published
from orchestration.config.run_config import RunConfig
from orchestration.run_folder import RunFolder
from orchestration.sources import export_stage
from orchestration.tables import final_table


def export(config: RunConfig, folder: RunFolder, stage: str, checkpoint: Path) -> None:
    """Write export/last and export/best: the ensemble of a stage, ready to serve."""
    best = verify(checkpoint).get("best")
    sources = {"last": checkpoint, "best": checkpoint.parent / best["checkpoint"] if best else checkpoint}
    for name, source in sources.items():
        verify(source)
        export_stage(config, folder, stage, source, folder.path / "export" / name)


def table(config: RunConfig, data: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> str:
    """The final table, with what was published for this recipe under it."""
    title = (
        f"{config.method.name}, {config.method.num_experts} expert{'s' if config.method.num_experts > 1 else ''}, "
        f"{config.backbone.name} {config.backbone.depth}, {config.dataset.name}"
    )
    text = final_table(evaluations, data, title=title, seed=config.seed)
    line = published(config)
    return f"{text}\n{line}" if line else text
