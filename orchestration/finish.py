"""What a run leaves behind: served models, pictures, the final table. Everything from the run folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aggregation.serving import export_model
from orchestration.checkpoint import read_tensors, verify
from orchestration.config import RunConfig, published
from orchestration.run_folder import DATA, RunFolder
from orchestration.tables import final_table


def export(config: RunConfig, folder: RunFolder, checkpoint: Path) -> None:
    """Write export/last and export/best: the ensemble, ready to serve."""
    best = verify(checkpoint).get("best")
    sources = {"last": checkpoint, "best": checkpoint.parent / best["checkpoint"] if best else checkpoint}
    data = json.loads((folder.path / DATA).read_text())
    for name, source in sources.items():
        verify(source)
        export_model(
            folder.path / "export" / name,
            ensemble_state(config, source),
            backbone=config.backbone,
            head=config.method.head,
            aggregator=config.method.aggregator,
            dataset=config.dataset,
            expert_names=config.method.expert_names,
            reduce_dimension=config.method.reduce_dimension,
            class_names=data["class_names"],
            image_shape=data["image_shape"],
        )


def ensemble_state(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """`Ensemble.state_dict()` of trunk and all experts, from a checkpoint of any mesh."""
    state: dict[str, Any] = {}
    for name in ("trunk", *config.method.expert_names):
        state |= read_tensors(checkpoint, name)
    return state


def table(config: RunConfig, data: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> str:
    """The final table, with what was published for this recipe under it."""
    title = (
        f"{config.method.name}, {config.method.num_experts} expert{'s' if config.method.num_experts > 1 else ''}, "
        f"{config.backbone.name} {config.backbone.depth}, {config.dataset.name}"
    )
    text = final_table(evaluations, data, title=title, seed=config.seed)
    line = published(config)
    return f"{text}\n{line}" if line else text
