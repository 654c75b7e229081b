"""What of a recipe does not fit together: stages, flows, objectives, teachers, names. Every problem with its key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from experts.ensemble import check_names
from experts.registry import piece

if TYPE_CHECKING:
    from orchestration.config import MethodConfig, RunConfig, StageConfig

_LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255


def recipe_problems(method: MethodConfig) -> Iterator[str]:
    """What does not fit, in words that begin with the key, which is one of `method`."""
    yield from _names_problems("experts", method.experts, method.num_experts)
    earlier: list[str] = []
    for name, stage in method.stages.items():
        found = [*_stage_problems(name, stage, method, earlier), *_learning_problems(name, stage, method)]
        yield from (f"stages.{name}.{problem}" for problem in found)
        yield from _rule_problems(name, method, earlier)
        earlier.append(name)
    if method.router is not None and not any(_trains_router(stage) for stage in method.stages.values()):
        yield "router: no stage trains it; add one with flow 'router', as method=ride_router has it, or set it to null"
    if method.backbone_weights is not None and all(method.starts_from(name) for name in method.stages):
        yield "backbone_weights: every stage has start_from, no network begins anew; set it to null"


def name_problems(config: RunConfig) -> Iterator[str]:
    """Names that become names of files and folders, and would lie elsewhere or be no such name."""
    name = config.run_name
    fits = name.isprintable() and len(name.encode()) <= _LONGEST_NAME  # what cannot be encoded is not printable
    if not fits or name.startswith(".") or set("/\\") & set(name):
        whence = "" if config.run.name else " (made of method.name, dataset.name and seed)"
        yield (
            f"run.name = {name!r}{whence}: needed the name of one folder, of at most {_LONGEST_NAME} bytes, "
            f"without / and not beginning with a dot; where that folder lies is run.dir"
        )
    for stage in config.method.stages:
        if not re.fullmatch(r"[\w-]+", stage):
            yield f"method.stages: {stage!r} is no name of a stage; needed letters, digits, _ and - alone"


def data_problems(config: RunConfig) -> Iterator[str]:
    """What of the data does not fit the recipe, as far as the config says."""
    data = config.dataset
    if data.val_per_class or data.val_list or data.source == "image_folder":  # a folder may have val/ beside test/
        return
    for name, stage in config.method.stages.items():
        if piece("objective", stage.objective.name).observes:
            yield (
                f"dataset.val_per_class = 0: objective '{stage.objective.name}' of stage {name} needs a validation "
                f"split, and never takes the test set; set dataset.val_per_class (cut from the training pool) or, for "
                f"source=image_list, dataset.val_list"
            )


def _names_problems(key: str, names: tuple[str, ...] | None, num_experts: int) -> Iterator[str]:
    if names is None:
        return
    if len(names) != num_experts:
        yield f"{key} = {list(names)}: {len(names)} names; needed {num_experts}, as num_experts says; change either"
    try:
        check_names(names)
    except ValueError as problem:
        yield f"{key}: {problem}"


def _rule_problems(name: str, method: MethodConfig, earlier: list[str]) -> Iterator[str]:
    """What of the rule that combines a stage's experts does not fit the experts."""
    rule = method.aggregator_in(name)
    for check, against in (("check_head", method.head), ("check_experts", method.names_in(name))):
        if hasattr(rule, check):
            try:
                getattr(rule, check)(against)
            except ValueError as problem:
                yield str(problem)
    if rule.name == "router" and not any(_trains_router(method.stages[stage]) for stage in (*earlier, name)):
        yield (
            f"stages.{name}.aggregator = router: no router is trained by then; needed a stage with flow 'router', as "
            f"method=ride_router has it; set aggregator.name=mean_logits"
        )


def _trains_router(stage: StageConfig) -> bool:
    return "gates" in piece("flow", stage.flow.name).learns


def _stage_problems(name: str, stage: StageConfig, method: MethodConfig, earlier: list[str]) -> Iterator[str]:
    try:
        stage.objective.check_head(method.head)
    except ValueError as problem:
        yield str(problem)
    yield from _names_problems("experts", stage.experts, method.num_experts)
    yield from _flow_problems(stage, method)
    yield from _teacher_problems(stage, method)
    started = (stage.start_from.stage,) if stage.start_from and stage.start_from.stage else ()
    taught = tuple(teacher.stage for teacher in stage.teachers.values() if teacher.stage)
    for key, names in (("after", stage.after or ()), ("start_from.stage", started), ("teachers", taught)):
        for other in names:
            if other not in earlier:
                yield f"{key} = {other}: needed an earlier stage of the recipe: {', '.join(earlier) or 'there is none'}"


def _flow_problems(stage: StageConfig, method: MethodConfig) -> Iterator[str]:
    flow, objective = piece("flow", stage.flow.name), piece("objective", stage.objective.name)
    flow_is, objective_is = f"flow '{stage.flow.name}'", f"objective '{stage.objective.name}'"
    if flow.needs_partner and stage.partner_sampler is None:
        yield f"partner_sampler: not set; {flow_is} pairs every batch with a second one; set a sampler"
    if not flow.needs_partner and stage.partner_sampler is not None:
        yield f"partner_sampler = {stage.partner_sampler.name}: {flow_is} takes one batch only; set it to null"
    if objective.label_sets == 2 and not flow.own_streams:
        yield f"{objective_is} wants the labels of two batches, {flow_is} shows experts one; set flow.name=bilateral"
    if (objective.extra_outputs > 0) != ("gates" in flow.learns):
        yield f"{objective_is} and {flow_is} do not fit; a router is trained by objective 'router' and flow 'router'"
    if "gates" in flow.learns and (method.router is None or method.num_experts < 2):
        yield (
            f"{flow_is}: the ensemble has no router to train; needed method.router and 2 experts or more, found "
            f"method.router {'unset' if method.router is None else 'set'} and method.num_experts = "
            f"{method.num_experts}; set method.router.name=ride"
        )
    partner = {"ace": "ace", "bbn": "bilateral"}  # the objective's loss is meant for what this flow shows its experts
    if partner.get(stage.objective.name, stage.flow.name) != stage.flow.name or (
        stage.flow.name in partner.values() and stage.objective.name not in partner
    ):
        yield f"{objective_is} and {flow_is} do not fit; ace goes with flow 'ace', bbn with flow 'bilateral'"
    if method.head.name == "bilateral" and stage.flow.name != "bilateral":
        yield f"{flow_is}: method.head.name = bilateral is for flow 'bilateral'; set method.head.name=linear"
    if stage.flow.name in partner.values() and method.shared_head:
        yield f"{flow_is}: method.shared_head = true; needed a head in each expert; set method.shared_head=false"
    rule = stage.aggregator or method.aggregator
    ours, theirs = getattr(rule, "groups", None), getattr(stage.objective, "groups", None)
    if ours is not None and theirs is not None and ours != theirs:
        yield f"objective.groups = {_rule(theirs)}, aggregator.groups = {_rule(ours)}; needed the same; set both"
    if stage.mixup is not None and flow.needs_partner:
        yield f"mixup: {flow_is} pairs batches already; set mixup=null"
    allowed = objective.num_experts_allowed
    if allowed is not None and method.num_experts not in allowed:
        yield (
            f"{objective_is}: method.num_experts = {method.num_experts}; it takes {' or '.join(map(str, allowed))}; "
            f"set method.num_experts={allowed[0]}"
        )


def _learning_problems(name: str, stage: StageConfig, method: MethodConfig) -> Iterator[str]:
    learns, flow_is = piece("flow", stage.flow.name).learns, f"flow '{stage.flow.name}'"
    learning = learns - set(stage.freeze)
    if not learning:
        yield f"freeze = {list(stage.freeze)}: nothing is left to learn; {flow_is} trains {sorted(learns)}"
    for part, factor in stage.lr_factors.model_dump().items():
        if factor != 1 and part not in learning:
            yield f"lr_factors.{part} = {factor:g}: it does not learn in this stage; set it to 1"
    kept = [part for part in ("trunk", "features") if part not in learning]
    if kept and method.starts_from(name) is None and method.backbone_weights is None:
        yield (
            f"start_from: not set, and no stage comes before; {' and '.join(kept)} would stay at random weights, since "
            f"{flow_is} with freeze = {list(stage.freeze)} does not train them; set start_from.run=<folder of a "
            f"finished run>, or put a stage before that trains them"
        )


def _rule(groups: Any) -> str:
    return " ".join(f"{key}={value}" for key, value in groups.model_dump().items() if value is not None)


def _teacher_problems(stage: StageConfig, method: MethodConfig) -> Iterator[str]:
    wanted = stage.objective.teacher_names
    if wanted is not None:
        for name, teacher in stage.teachers.items():
            source = method.stages.get(teacher.stage) if teacher.stage else None
            subset = source.classes if source else None
            if subset is not None and subset.rule != stage.objective.groups:
                yield (
                    f"objective.groups = {_rule(stage.objective.groups)}, but its teacher's stage has "
                    f"stages.{teacher.stage}.classes.rule = {_rule(subset.rule)}; needed the same; set both"
                )
            if teacher.mode == "train":
                yield f"teachers.{name}.mode = train: its scores would depend on the batch; set it to eval"
        if set(wanted) != set(stage.teachers):
            yield (
                f"teachers = {sorted(stage.teachers)}: objective '{stage.objective.name}' needs {sorted(wanted)}; set "
                f"teachers.<name>.run or .stage for each"
            )
    elif stage.teachers and stage.distillation is None:
        yield "teachers: nothing learns from them; set distillation.name=mean_logits, or remove them"
    elif stage.distillation is not None and not stage.teachers:
        yield "distillation: there is no teacher; set teachers.teacher.run=<folder of a finished run>"
