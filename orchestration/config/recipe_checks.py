"""Why the parts of a recipe do not fit together: names of experts, head, flow, objective, teachers, what learns, order.

Every check asks the pieces themselves, by what their classes declare. No piece is known by its name here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from experts.ensemble import check_names
from experts.ramps import constant
from experts.registry import piece, registered_names
from experts.tunable import Tunable
from orchestration.config.recipe import Recipe, StageConfig

_STEPS_NEED = ("batch_size", "optimizer", "lr_schedule", "sampler", "objective")


def recipe_problems(method: Recipe) -> Iterator[str]:
    """Yield every problem of a recipe. A problem begins with its key, relative to `method`."""
    yield from _names_problems("experts", method.experts, method.num_experts)
    earlier: list[str] = []  # a stage may refer to these alone, so nothing can wait in a circle
    for name, stage in method.stages.items():
        if len(method.stages) > 1 and _missing(stage) == list(_STEPS_NEED):
            others = ", ".join(other for other in method.stages if other != name)
            yield (
                f"stages.{name}: a stage with steps (epochs = {stage.epochs}) that has none of "
                f"{', '.join(_STEPS_NEED)}; needed all of them, or a stage of the recipe: {others}"
            )
            earlier.append(name)
            continue
        found = [*_stage_problems(name, stage, method, earlier), *_learning_problems(name, stage, method)]
        yield from (f"stages.{name}.{problem}" for problem in [*found, *_head_problems(name, stage, method)])
        yield from _rule_problems(name, method, earlier)
        earlier.append(name)
    if method.router is not None and not _has_trained_router(method, list(method.stages)):
        yield f"router: no stage trains it; add one with {_router_flow()}, or set it to null"
    if method.backbone_weights is not None and all(method.starts_from(name) for name in method.stages):
        yield "backbone_weights: every stage has start_from, so no network starts from it; set it to null"


def _names_problems(key: str, names: tuple[str, ...] | None, num_experts: int) -> Iterator[str]:
    if names is None:
        return
    if len(names) != num_experts:
        yield f"{key} = {list(names)}: {len(names)} names; needed {num_experts}, as num_experts says; change either"
    try:
        check_names(names)
    except ValueError as problem:
        yield f"{key}: {problem}"


def _rule_problems(name: str, method: Recipe, earlier: list[str]) -> Iterator[str]:
    """Yield why the rule that combines a stage's experts does not fit the experts."""
    rule = method.aggregator_in(name)
    yield from _refusal(rule.check_head, method.head_in(name))
    yield from _refusal(rule.check_experts, method.names_in(name))
    source = method.scores_trained_in(name)
    where = "" if source == name else f"stages.{name}: its scores are trained in stage {source}; "
    yield from (f"{where}{problem}" for problem in learnt_problems(rule, method, name))
    if method.stages[name].epochs and (key := open_choice("aggregator", rule)):
        yield _only_without_steps(f"stages.{name}.aggregator.{key}")
    if piece("aggregator", rule.name).needs_router and not _has_trained_router(method, [*earlier, name]):
        yield (
            f"stages.{name}.aggregator = {rule.name}: no router is trained by then; needed a stage with "
            f"{_router_flow()}; set aggregator.name={_one_of('aggregator', lambda other: not other.needs_router)}"
        )


def learnt_problems(rule: Any, method: Recipe, stage: str) -> Iterator[str]:
    """Yield why a rule does not fit what the experts have learnt by the end of a stage.

    Args:
        rule: config of an aggregator, of this recipe or of one that goes on from it.
        method: that has the stage.
        stage: its name.
    """
    trained = method.stages.get(method.scores_trained_in(stage) or "")
    if trained is not None and trained.objective is not None and trained.sampler is not None:
        yield from _refusal(rule.check_objective, trained.objective)
        yield from _refusal(rule.check_sampler, trained.sampler)
        yield from _refusal(rule.check_class_weights, trained.class_weights)


def _refusal(check: Callable[[Any], None], against: Any) -> Iterator[str]:
    """Yield what a piece's own check says against another piece."""
    try:
        check(against)
    except ValueError as problem:
        yield str(problem)


def _one_of(kind: str, fits: Callable[[Any], bool] = lambda piece: True) -> str:
    """List the pieces of a kind that would do."""
    return " or ".join(name for name in registered_names(kind) if fits(piece(kind, name)))


def _router_flow() -> str:
    """Name the flow that trains a router, and a recipe that has it."""
    flows = {name: piece("flow", name) for name in registered_names("flow")}
    name, flow = next((name, flow) for name, flow in flows.items() if "gates" in flow.learns)
    return f"flow '{name}'" + (f", as method={flow.recipe} has it" if flow.recipe else "")


def _trains_router(stage: StageConfig) -> bool:
    return bool(stage.epochs) and "gates" in piece("flow", stage.flow.name).learns


def _has_trained_router(method: Recipe, stages: list[str]) -> bool:
    """Return whether a router is trained by the end of some stages, or comes with a saved run."""
    from_run = method.like is not None
    return from_run or any(_trains_router(method.stages[stage]) for stage in stages)


def open_choice(kind: str, config: Any) -> str | None:
    """Return the key of a piece's config that is left open, to be chosen on the validation split; None if none is."""
    cls = piece(kind, config.name)
    return cls.tuned_key if issubclass(cls, Tunable) and getattr(config, cls.tuned_key) is None else None


def _only_without_steps(key: str) -> str:
    return f"{key} = null: it is chosen on the validation split in a stage without steps; set a number, or epochs=0"


def _missing(stage: StageConfig) -> list[str]:
    """Return the keys that a stage with steps needs and has not; none of one without steps."""
    return [key for key in _STEPS_NEED if getattr(stage, key) is None] if stage.epochs else []


def _stage_problems(name: str, stage: StageConfig, method: Recipe, earlier: list[str]) -> Iterator[str]:
    yield from _names_problems("experts", stage.experts, method.num_experts)
    if stage.epochs:
        missing = _missing(stage)
        yield from (
            f"{key}: not set; needed a value in a stage with steps (epochs = {stage.epochs})" for key in missing
        )
        if not missing:
            yield from _refusal(stage.objective.check_head, method.head_in(name))
            if stage.class_weights is not None and (problem := stage.objective.weighting_problem()):
                yield f"class_weights: {problem}"
            yield from _flow_problems(name, stage, method)
            yield from _mixing_problems(stage)
            yield from _auxiliary_problems(name, stage, method)
            if stage.views:
                yield from _views_problems(stage)
            yield from _teacher_problems(stage, method)
    else:
        yield from _without_steps_problems(stage)
    started = (stage.start_from.stage,) if stage.start_from and stage.start_from.stage else ()
    taught = tuple(teacher.stage for teacher in stage.teachers.values() if teacher.stage)
    for key, names in (("after", stage.after or ()), ("start_from.stage", started), ("teachers", taught)):
        for other in names:
            if other not in earlier:
                yield f"{key} = {other}: needed an earlier stage of the recipe: {', '.join(earlier) or 'there is none'}"


def _without_steps_problems(stage: StageConfig) -> Iterator[str]:
    """Yield what a stage without steps has for steps alone."""
    why = "the stage has no steps (epochs = 0)"
    unused = [key for key, value in (("views", stage.views), ("augment", stage.augment)) if value]
    if unused:
        yield f"{', '.join(unused)}: {why}; remove {'them' if unused[1:] else 'it'}, or set epochs"
    if stage.mixing is not None:
        yield f"mixing.name = {stage.mixing.name}: {why}; set mixing=null, or epochs"
    if stage.auxiliaries:
        yield f"auxiliaries = {sorted(stage.auxiliaries)}: {why}; remove them, or set epochs"


def _head_problems(name: str, stage: StageConfig, method: Recipe) -> Iterator[str]:
    """Yield why the stage's head cannot begin with the weights that it gets, or would never have any worth."""
    config = method.head_in(name)
    head = piece("head", config.name)
    head_is = f"head '{config.name}'"
    source, before = method.starts_from(name), method.stage_before(name)
    if before is not None and (problem := head_problem(method, name, method.head_in(before).name)):
        yield f"head: {problem}"
    learnt = method.calibration if before is None else method.calibration_in(before)
    goes_on = source is not None and not {"heads", "calibration"} & set(stage.reinit)
    if goes_on and learnt and stage.calibration and stage.calibration.name != learnt.name:
        yield (
            f"calibration.name = {stage.calibration.name}: a head has one calibration, and the weights it begins with "
            f"have '{learnt.name}', which would be lost; set reinit=[calibration] to lose it, or leave the stage out"
        )
    if missing := sorted(set(stage.reinit) - parts_of(method, name)):
        yield f"reinit = {list(stage.reinit)}: the stage's experts have no {missing[0]}; remove it"
    if "heads" in stage.reinit and not head.fits and ("heads" in stage.freeze or not stage.epochs):
        why = "epochs = 0" if not stage.epochs else "freeze has heads"
        yield f"reinit = {list(stage.reinit)}: {head_is} would stay at random weights, since {why}; change either"
    if stage.reinit and source is None:
        yield f"reinit = {list(stage.reinit)}: the stage begins with new weights anyway; set start_from, or remove it"
    if head.fits and stage.epochs:
        yield f"head: {head_is} is fitted on the training images, not trained; set epochs=0"
    trained = {piece("auxiliary", own.name).head for own in stage.auxiliaries.values()}
    if "memory" in parts_that_learn(method, name) and config.name not in trained:
        yield f"freeze = {list(stage.freeze)}: no auxiliary trains the memory of {head_is}; add one, or freeze memory"
    if head.own_per_expert and method.shared_head:
        yield f"head: {head_is} is fitted to one expert's features; set method.shared_head=false, or another head"
    if stage.epochs and (key := open_choice("head", config)):
        yield _only_without_steps(f"head.{key}")


def head_problem(method: Recipe, stage: str, before: str) -> str | None:
    """Return why a stage's head cannot take over the weights of the head that it gets; None if it can.

    Args:
        method: the recipe.
        stage: that begins with weights of another.
        before: registered name of the head that these were trained with.
    """
    config, name = method.stages[stage], method.head_in(stage).name
    head = piece("head", name)
    if "heads" in config.reinit or name == before or before in head.continues:
        return None
    goes_on = f"continues {_quote(head.continues)} only" if head.continues else "takes over no other head's weights"
    renew = "set reinit=[heads] for new weights, or " if config.epochs or head.fits else "set "
    return f"head '{name}' {goes_on}, found '{before}'; {renew}another head.name, or leave the stage out"


def _quote(names: Iterable[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _flow_problems(name: str, stage: StageConfig, method: Recipe) -> Iterator[str]:
    flow, objective = piece("flow", stage.flow.name), piece("objective", stage.objective.name)
    flow_is = f"flow '{stage.flow.name}'"
    if flow.needs_partner and stage.partner_sampler is None:
        yield f"partner_sampler: not set; {flow_is} pairs every batch with a second one; set a sampler"
    if not flow.needs_partner and stage.partner_sampler is not None:
        yield f"partner_sampler = {stage.partner_sampler.name}: {flow_is} takes one batch only; set it to null"
    pairing = flow.pairing_problem(objective)
    if pairing is not None:
        yield pairing
    if "gates" in flow.learns and (method.router is None or method.num_experts < 2):
        yield (
            f"{flow_is}: the ensemble has no router to train; needed method.router and 2 experts or more, found "
            f"method.router {'unset' if method.router is None else 'set'} and method.num_experts = "
            f"{method.num_experts}; set method.router.name={_one_of('router')}"
        )
    head_name = method.head_in(name).name
    head = piece("head", head_name)
    if head.flow not in (None, stage.flow.name):
        others = _one_of("head", lambda other: other.flow is None and not other.fits)
        way = f"set method.head.name to {others}"
        if method.stage_before(name) is not None:
            way = f"give the stage new heads, reinit=[heads] and head.name = {others}, or set flow.name={head.flow}"
        yield f"{flow_is}: head '{head_name}' is for flow '{head.flow}'; {way}"
    if flow.needs_own_heads and method.shared_head:
        yield f"{flow_is}: method.shared_head = true; needed a head in each expert; set method.shared_head=false"
    number = stage.objective.number_problem(method.num_experts)
    if number is not None:
        yield number


def _mixing_problems(stage: StageConfig) -> Iterator[str]:
    """Yield why the images of a stage cannot be mixed as they are to be."""
    if stage.mixing is None:
        return
    if piece("flow", stage.flow.name).needs_partner:
        yield f"mixing.name = {stage.mixing.name}: flow '{stage.flow.name}' pairs batches already; leave out the mixing"
    if not stage.objective.takes_mixed:
        yield (
            f"mixing.name = {stage.mixing.name}: objective '{stage.objective.name}' knows every image by its "
            f"place in the training set, and a mixed one is two images; set mixing=null, or another objective.name"
        )
    if problem := stage.mixing.length_problem(stage.epochs):
        yield problem


def _auxiliary_problems(name: str, stage: StageConfig, method: Recipe) -> Iterator[str]:
    """Yield why the experts of a stage cannot have its auxiliaries."""
    if not stage.auxiliaries:
        if piece("objective", stage.objective.name).silent:
            yield f"objective.name = {stage.objective.name}: nothing trains the experts; set another, or auxiliaries"
        return
    if stage.objective_weight != constant(1.0) and piece("objective", stage.objective.name).silent:
        yield f"objective_weight: objective '{stage.objective.name}' is always 0; leave it out, or set another"
    if not piece("flow", stage.flow.name).takes_auxiliaries:
        yield (
            f"auxiliaries = {sorted(stage.auxiliaries)}: flow '{stage.flow.name}' takes none; set flow.name="
            f"{_one_of('flow', lambda other: other.takes_auxiliaries)}, or remove them"
        )
    if stage.mixing is not None:
        yield (
            f"auxiliaries = {sorted(stage.auxiliaries)}: they look at the labels of images, and mixed images have two "
            f"each; set mixing=null, or remove them"
        )
    for key, config in stage.auxiliaries.items():
        at = f"auxiliaries.{key}"
        if config.views > 1 + len(stage.views):
            yield (
                f"{at}: auxiliary '{config.name}' compares {config.views} views of every image, and the stage makes "
                f"{1 + len(stage.views)}; set views=[<a stack of augmentations>], as views=[simclr]"
            )
        if not key.isidentifier() or hasattr(nn.ModuleDict, key) or key in ("loss", stage.objective.name):
            yield (
                f"{at}: needed a name of letters, digits and underscores that is no other's, as the terms of the loss "
                f"are; choose another"
            )
        unknown = [own for own in config.experts or () if own not in method.names_in(name)]
        if unknown or config.experts == ():
            found = unknown[0] if unknown else "none"
            yield f"{at}.experts: found {found}; needed some of {', '.join(method.names_in(name))}; or unset it"
        if stage.batch_size and (problem := config.batch_problem(stage.batch_size, drop_last=stage.drop_last)):
            yield f"{at}.{problem}"
        yield from _head_of_auxiliary_problems(at, config, method, name)
    yield from _maker_problems(stage)
    momenta = {key: own for key, config in stage.auxiliaries.items() if (own := config.momentum_copy) is not None}
    if len(set(momenta.values())) > 1:
        found = ", ".join(f"{key}.momentum = {value:g}" for key, value in momenta.items())
        yield f"auxiliaries: {found}; the network has one copy; set them equal"


def _head_of_auxiliary_problems(at: str, config: Any, method: Recipe, stage: str) -> Iterator[str]:
    """Yield why an auxiliary cannot work with the head of its expert."""
    auxiliary, found = piece("auxiliary", config.name), method.head_in(stage).name
    if auxiliary.uses_head and method.shared_head:
        yield f"{at}: auxiliary '{config.name}' trains an expert's own head; set method.shared_head=false, or remove it"
    if auxiliary.head not in (None, found):
        yield (
            f"{at}: auxiliary '{config.name}' trains the memory of head '{auxiliary.head}', found head '{found}'; set "
            f"head.name={auxiliary.head}, or remove it"
        )


def _maker_problems(stage: StageConfig) -> Iterator[str]:
    """Yield why auxiliaries of a stage cannot make images of their own."""
    makers = {key: config for key, config in stage.auxiliaries.items() if config.makes}
    if not makers:
        return
    key, config = next(iter(makers.items()))
    at = f"auxiliaries.{key}: auxiliary '{config.name}' makes images"
    if len(makers) > 1:
        yield f"auxiliaries = {sorted(makers)}: {len(makers)} of them make images; needed one; remove the others"
    if config.experts is not None:
        yield f"{at} that all experts need alike, found experts = {list(config.experts)}; remove experts"
    if stage.teachers:
        yield f"{at}, which teachers have not seen; remove teachers or the auxiliary"
    if stage.objective.whole_batch or not stage.objective.takes_mixed:
        yield (
            f"{at}, and objective '{stage.objective.name}' needs the training images as they are; set another "
            f"objective.name, or remove it"
        )


def _views_problems(stage: StageConfig) -> Iterator[str]:
    """Yield why the images of a stage cannot have further views."""
    flow = piece("flow", stage.flow.name)
    if stage.mixing is not None:
        yield f"views: mixing.name = {stage.mixing.name} is set too; images are mixed or have views: set either"
    if flow.needs_partner and not flow.takes_auxiliaries:
        yield f"views: flow '{stage.flow.name}' pairs every image with another; needed views=[], or another flow"


def _learning_problems(name: str, stage: StageConfig, method: Recipe) -> Iterator[str]:
    flow_is = f"flow '{stage.flow.name}'"
    learning = parts_that_learn(method, name)
    if stage.epochs:
        if not learning:
            learns = sorted(piece("flow", stage.flow.name).learns & parts_of(method, name))
            yield f"freeze = {list(stage.freeze)}: nothing is left to learn; {flow_is} trains {learns}"
        if "auxiliaries" in stage.freeze and not stage.auxiliaries:
            yield f"freeze = {list(stage.freeze)}: the stage has no auxiliaries; leave them out"
        for part, factor in stage.lr_factors.model_dump().items():
            if factor != 1 and part not in learning:
                yield f"lr_factors.{part} = {factor:g}: it does not learn in this stage; set it to 1"
    kept = [part for part in ("trunk", "features") if part not in learning]
    if kept and method.starts_from(name) is None and method.backbone_weights is None:
        why = f"{flow_is} with freeze = {list(stage.freeze)}" if stage.epochs else "a stage without steps"
        yield (
            f"start_from: not set, and no stage comes before; {' and '.join(kept)} would stay at random weights, since "
            f"{why} does not train them; set start_from.run=<folder of a finished run>, or put a stage before that "
            f"trains them"
        )


def parts_of(method: Recipe, stage: str) -> frozenset[str]:
    """Return the parts, of PARTS, that a stage's ensemble has."""
    found = {"trunk", "features", "heads"} | ({"calibration"} if method.calibration_in(stage) else set())
    found |= {"attention"} if method.attention is not None else set()
    found |= {"memory"} if piece("head", method.head_in(stage).name).has_memory else set()
    found |= {"auxiliaries"} if method.stages[stage].auxiliaries else set()
    return frozenset(found | (set() if method.router is None else {"gates"}))


def parts_that_learn(method: Recipe, stage: str) -> frozenset[str]:
    """Return the parts, of PARTS, that learn in a stage: none in a stage without steps."""
    config = method.stages[stage]
    if not config.epochs:
        return frozenset()
    return (piece("flow", config.flow.name).learns & parts_of(method, stage)) - set(config.freeze)


def _teacher_problems(stage: StageConfig, method: Recipe) -> Iterator[str]:
    wanted = stage.objective.teacher_names
    if wanted is not None:
        for name, teacher in stage.teachers.items():
            source = method.stages.get(teacher.stage) if teacher.stage else None
            subset = source.classes if source else None
            rule = stage.objective.group_rule
            if subset is not None and subset.rule != rule:
                yield (
                    f"objective.groups = {rule}, but its teacher's stage has stages.{teacher.stage}.classes.rule = "
                    f"{subset.rule}; needed the same; set both"
                )
            if teacher.mode == "train":
                yield f"teachers.{name}.mode = train: its scores would depend on the batch; set it to eval"
        if set(wanted) != set(stage.teachers):
            yield (
                f"teachers = {sorted(stage.teachers)}: objective '{stage.objective.name}' needs {sorted(wanted)}; set "
                f"teachers.<name>.run or .stage for each"
            )
    elif stage.teachers and stage.distillation is None:
        yield (f"teachers: nothing learns from them; set distillation.name={_one_of('distillation')}, or remove them")
    elif stage.distillation is not None and not stage.teachers:
        yield "distillation: there is no teacher; set teachers.teacher.run=<folder of a finished run>"
