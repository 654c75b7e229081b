"""Notes on what a stage would do only after its last epoch, as in a shortened run: drops, re-weighting, warm-up."""

from __future__ import annotations

from collections.abc import Iterator

from orchestration.config.method import MethodConfig
from orchestration.config.recipe import StageConfig


def never_reached(stage: StageConfig) -> list[str]:
    """List what a schedule or objective does only after the stage's last epoch."""
    if not stage.epochs or stage.objective is None:
        return []
    schedule = stage.lr_schedule
    late = [f"the end of the warm-up in epoch {schedule.warm_up}"] if schedule.warm_up > stage.epochs else []
    late += [f"the learning rate's drop after epoch {n}" for n in schedule.drops if n >= stage.epochs]
    switches = {f"objective.{key}": n for key, n in stage.objective.switches.items()}
    if stage.class_weights is not None:
        switches |= {f"class_weights.{key}": n for key, n in stage.class_weights.switches.items()}
    ramps = {f"auxiliaries.{name}.weight": own.weight for name, own in stage.auxiliaries.items()}
    ramps["objective_weight"] = stage.objective_weight
    switches |= {f"{key}.after_epoch": ramp.after_epoch for key, ramp in ramps.items() if ramp.after_epoch is not None}
    return late + [f"{key} = {n}" for key, n in switches.items() if n >= stage.epochs]


def late_notes(method: MethodConfig) -> Iterator[str]:
    """Yield a sentence for each stage that ends before something that it would do."""
    for name, stage in method.stages.items():
        if late := never_reached(stage):
            yield (
                f"stage {name} ends with epoch {stage.epochs}, before {', '.join(late)}; written as percentages of the "
                f"stage they move with its length"
            )
