"""`expertail evaluate RUN --weights ... --distribution ...`: a saved run on test sets of other class distributions.

Every distribution is a part of one test set, so the networks see each image once, and twice more in every pass of the
learning; what is learnt, compared and drawn comes from the kept logits (4 bytes x E experts x N images x C classes,
three times over while weights are learnt). Nothing of the run is changed.

Shapes: E experts, N images of the whole split, C classes; 2 views.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from aggregation.metrics import Scores
from aggregation.weight_learning import (
    PUBLISHED,
    Learner,
    Settled,
    WeightLearning,
    class_prior,
    combine,
    correct_for_prior,
    disagreement,
    oracle_weights,
    settle,
)
from experts.augmentation.views import ViewMaker, Views, default_views
from experts.data.batches import share
from experts.data.keyed_random import key, permutation
from experts.data.label_shift import Distribution, distribution_positions, parse_distribution, published_distributions
from experts.methods.tade import tade_offsets
from experts.precision import at_least_float32
from experts.registry import Settings
from orchestration.config.compose import parse
from orchestration.config.run_config import RunConfig
from orchestration.results.label_shift_table import COMPARED, distributions_table, draw_distributions
from orchestration.results.saved_run import SavedRun, keep, open_run, threads_of

AS_TRAINED, UNIFORM, LEARNT, GIVEN, KNOWN, ORACLE = COMPARED
RULES = ("uniform", "test-time", "known-prior")
S = TypeVar("S", bound=Settings)
CHECK_PASS = 0  # number of the pass whose views are for checking only; those learnt from count from 1


class KnownPrior(Settings):
    """What the correction for a known test distribution takes each expert to be trained for."""

    trained: Literal["auto", "uniform", "train"] | tuple[Literal["uniform", "train"], ...] = "auto"
    """The class distribution of an expert's softmax: of the training set, or uniform where training is balanced; one
    word for all experts, or one each. auto: by the objective of the last stage, see `trained_priors`."""


@dataclass(frozen=True)
class Request:
    """What is asked of a run.

    Attributes:
        rule: "uniform", "test-time", "known-prior" or "given".
        given: the weights, for "given".
        names: of distributions, as asked.
        learning, views, known_prior: keys that differ from the published values.
        rest: overrides that are for the run's config.
    """

    rule: str
    given: tuple[float, ...] | None
    names: tuple[str, ...]
    learning: dict[str, Any]
    views: dict[str, Any]
    known_prior: dict[str, Any]
    rest: list[str]


def evaluate_distributions(
    run: str, weights: str, distributions: str, which: str, split: str, overrides: list[str]
) -> str:
    """Weigh the experts by several rules and compare them on several class distributions.

    Keeps the numbers as evaluation/<rule>.json and the picture as report/<rule>.png (`test-time`, `test_time`).

    Args:
        run: the run folder.
        weights: "uniform", "test-time", "known-prior", or numbers separated by commas.
        distributions: names separated by commas, or "published".
        which: "best" or "last", of the run's models.
        split: "test" or "val".
        overrides: `a.b=value` for `test_time.*`, `views.*`, `known_prior.*`, and what `reevaluate` takes.

    Returns:
        A table, what was noticed, and where both were kept.

    Raises:
        ValueError: what `reevaluate` refuses; a rule, distribution or key that is not known; weights that are not one
            for each expert, 0 or more, together 1; a named distribution that would leave a class without an image.
    """
    request = _request(weights, distributions, overrides)
    saved = open_run(run, which, split, request.rest)
    if request.given is not None and len(request.given) != len(saved.model.description.expert_names):
        names = saved.model.description.expert_names
        raise ValueError(
            f"--weights {weights}: {len(request.given)} numbers; the run has {len(names)} experts, "
            f"{', '.join(names)}; give one for each, in this order"
        )
    with threads_of(saved.config), torch.no_grad():
        result = _measure(saved, request)
    result = _plain(result)
    name = request.rule if (which, split) == ("best", "test") else f"{request.rule}-{which}-{split}"
    told = [keep(saved.folder, name, result), draw_distributions(saved.folder, name, result)]
    return "\n".join([distributions_table(result), "", *told])


def _measure(saved: SavedRun, request: Request) -> dict[str, Any]:
    config, description = saved.config, saved.model.description
    learning = _settings("test_time", WeightLearning, PUBLISHED.get(config.dataset.name, {}), request.learning)
    views = _settings("views", Views, default_views(config.dataset), request.views)
    known = _settings("known_prior", KnownPrior, {}, request.known_prior)
    trained_EC, trained_for = trained_priors(config, known, saved.data["counts"])
    parts, skipped = _positions(saved, request.names)
    logits_ENC, own_NC, labels_N = _logits(saved)
    learnt: dict[str, tuple[Settled, Learner]] = {}
    if request.rule == "test-time":
        learnt = _learn(saved, learning, views, parts)
    found = {}
    for distribution, positions in parts.items():
        name, rows = distribution.name, torch.from_numpy(positions)
        rules: dict[str, list[float]] = {UNIFORM: [1 / len(logits_ENC)] * len(logits_ENC)}
        if name in learnt:
            rules[LEARNT] = learnt[name][0].weights
        if request.given is not None:
            rules[GIVEN] = list(request.given)
        found[name] = _compare(saved, logits_ENC[:, rows], own_NC[rows], labels_N[rows], rules, trained_EC)
        if name in learnt:
            settled, learner = learnt[name]
            passes = {"passes": len(learner.trajectory), "stopped_early": learner.stopped}
            found[name]["learning"] = {**asdict(settled), **passes, "trajectory": learner.trajectory}
    return {
        **saved.moment(),
        "rule": request.rule,
        "dataset": config.dataset.name,
        "method": config.method.name,
        "run": saved.folder.name,
        "aggregator": description.aggregator["name"],
        "experts": list(description.expert_names),
        "group_sizes": _group_sizes(saved),
        "settings": learning.model_dump(mode="json") if learnt else None,
        "views": views.model_dump(mode="json") if learnt else None,
        "trained_for": trained_for,
        "skipped": skipped,
        "distributions": found,
    }


def _compare(
    saved: SavedRun,
    logits_ENC: Tensor,
    own_NC: Tensor,
    labels_N: Tensor,
    rules: Mapping[str, list[float]],
    trained_EC: np.ndarray,
) -> dict[str, Any]:
    """Scores of every weighting and of every expert alone on one distribution; the oracle is found here."""
    description, counts = saved.model.description, saved.data["counts"]
    counts_C = np.bincount(labels_N.numpy(), minlength=description.num_classes)
    target_C = class_prior(counts_C)
    logits_ENC, own_NC, labels_N = (values.to(saved.device) for values in (logits_ENC, own_NC, labels_N))
    weights = {**rules, ORACLE: oracle_weights(logits_ENC, labels_N, list(rules.values()))}
    scores = Scores()
    for part in torch.arange(len(labels_N)).split(saved.config.run.evaluation_batch_size):
        logits_EBC = logits_ENC[:, part]
        members = {AS_TRAINED: own_NC[part], KNOWN: correct_for_prior(logits_EBC, target_C, trained_EC).mean(dim=0)}
        members |= {rule: combine(torch.tensor(weights_E), logits_EBC) for rule, weights_E in weights.items()}
        alone = {f"{name} alone": z_BC for name, z_BC in zip(description.expert_names, logits_EBC, strict=True)}
        scores.update({rule: members[rule] for rule in COMPARED if rule in members} | alone, labels_N[part])
    return {**scores.result(counts, saved.cuts), "test_counts": counts_C.tolist(), "weights": weights}


def _group_sizes(saved: SavedRun) -> dict[str, int]:
    groups = (saved.data.get("groups") or {}).get("by_count") or {}
    return {group: len(ids) for group, ids in groups.items()}


def _positions(saved: SavedRun, names: tuple[str, ...]) -> tuple[dict[Distribution, np.ndarray], dict[str, str]]:
    """Images of every distribution, from the most forward to the most backward; and why published ones are left out.

    Raises:
        ValueError: a distribution that was asked for by name leaves a class without an image.
    """
    asked = {parse_distribution(name) for name in names if name != "published"}
    published = published_distributions(saved.config.dataset.name) if "published" in names else []
    parts, skipped = {}, {}
    for distribution in sorted({*asked, *published}, key=lambda d: d.shift):
        try:
            positions = distribution_positions(distribution, saved.store.labels, np.asarray(saved.data["counts"]))
        except ValueError as problem:
            if distribution in asked:
                raise
            skipped[distribution.name] = str(problem).removeprefix(f"--distribution {distribution.name}: ")
            continue
        parts[distribution] = positions
    return parts, skipped


def _logits(saved: SavedRun) -> tuple[Tensor, Tensor, Tensor]:
    """The split without chance: logits [E, N, C], the run's own scores [N, C], labels [N]; on the CPU."""
    logits, own, labels = [], [], []
    for images_B3HW, labels_B in saved.batches():
        outputs = saved.outputs(images_B3HW)
        logits.append(at_least_float32(outputs.logits_EBC).cpu())
        own.append(saved.model.aggregator.members(outputs)["ensemble"].cpu())
        labels.append(labels_B.cpu())
    return torch.cat(logits, dim=1), torch.cat(own), torch.cat(labels)


def _learn(
    saved: SavedRun, learning: WeightLearning, views: Views, parts: Mapping[Distribution, np.ndarray]
) -> dict[str, tuple[Settled, Learner]]:
    """Learn weights for every distribution, side by side: an image's views serve all of them that have it."""
    description = saved.model.description
    seed, num_experts = learning.seed, len(description.expert_names)
    maker = ViewMaker(
        saved.store.to(saved.device), saved.dataset.config, views, seed=seed, device=saved.device, dtype=saved.dtype
    )
    learners = {distribution: Learner(num_experts, learning) for distribution in parts}
    for number in range(1, learning.epochs + 1):
        active = [distribution for distribution, learner in learners.items() if not learner.stopped]
        if not active:
            break
        _say(f"learning weights without labels: pass {number} of {learning.epochs}")
        seen_2ENC = _view_logits(saved, maker, number, np.unique(np.concatenate([parts[d] for d in active])))
        for distribution in active:
            order = permutation(key(seed, "test-time order", distribution.name, number), len(parts[distribution]))
            rows = torch.from_numpy(parts[distribution][order])
            for batch in rows.split(learning.batch_size):
                with torch.enable_grad():
                    learners[distribution].step(seen_2ENC(batch))
            learners[distribution].end_pass()
    _say("checking the weights on views that were not learnt from")
    seen_2ENC = _view_logits(saved, maker, CHECK_PASS, np.unique(np.concatenate(list(parts.values()))))
    uniform_E = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    settled = {}
    for distribution, learner in learners.items():
        rows = torch.from_numpy(parts[distribution])
        uniform, learnt = 0.0, 0.0
        for batch in rows.split(learning.batch_size):
            seen_2EBC = seen_2ENC(batch)
            uniform += disagreement(uniform_E, seen_2EBC, learning.entropy).sum().item()
            learnt += disagreement(learner.weights_E, seen_2EBC, learning.entropy).sum().item()
        guarded = settle(learner, uniform / len(rows), learnt / len(rows), description.num_classes)
        settled[distribution.name] = guarded, learner
    return settled


def _view_logits(saved: SavedRun, maker: ViewMaker, number: int, positions: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Logits of both views of these images in one pass: a function of positions in the split, to [2, E, B, C]."""
    size = saved.config.run.evaluation_batch_size
    cuts = [share(len(positions), part, -(-len(positions) // size)) for part in range(-(-len(positions) // size))]
    views = []
    for view in range(2):
        batches = (maker.make(positions[first:last], number, view) for first, last in cuts)
        views.append(torch.cat([at_least_float32(saved.outputs(b).logits_EBC).cpu() for b in batches], dim=1))
    logits_2EUC = torch.stack(views)
    place = torch.full((len(saved.store),), -1, dtype=torch.int64)
    place[torch.from_numpy(positions)] = torch.arange(len(positions))
    return lambda rows: logits_2EUC[:, :, place[rows]]


def trained_priors(config: RunConfig, known: KnownPrior, counts: list[int]) -> tuple[np.ndarray, list[str]]:
    """The class distribution that each expert's softmax is for: its logs, float64 [E, C] up to a constant, and words.

    auto, by the objective of the last stage: plain cross-entropy on instance-balanced batches learns the training
    distribution. TADE's experts learn it from scores with an offset each, so that of the scores alone is the training
    distribution less the offset. All other objectives aim at a balanced test, and are taken at their word: uniform.

    Raises:
        ValueError: words for another number of experts.
    """
    num_experts = len(config.method.expert_names)
    stage = list(config.method.stages.values())[-1]
    log_train_C = np.log(class_prior(np.asarray(counts)))
    if known.trained == "auto" and stage.objective.name == "tade":
        settings = stage.objective
        offset_EC = tade_offsets(
            torch.tensor(counts), tau=settings.tau, ties=settings.inverse, log_guard=settings.log_guard
        )
        return log_train_C - offset_EC.numpy(), ["train", "uniform", f"inverse (tau {settings.tau:g})"]
    if known.trained == "auto":
        plain = stage.objective.name == "cross_entropy" and stage.sampler.name == "instance_balanced"
        words = ["train" if plain else "uniform"] * num_experts
    elif isinstance(known.trained, str):
        words = [known.trained] * num_experts
    else:
        words = list(known.trained)
    if len(words) != num_experts:
        raise ValueError(
            f"known_prior.trained = {words}: {len(words)} words; needed one, or one for each of {num_experts} experts"
        )
    rows = {"train": log_train_C, "uniform": np.zeros_like(log_train_C)}
    return np.stack([rows[word] for word in words]), words


def _request(weights: str, distributions: str, overrides: list[str]) -> Request:
    """Everything that can be said wrong without looking at the run, refused before anything is loaded."""
    given = None
    rule = weights
    if weights not in RULES:
        rule, given = "given", _numbers(weights)
    names = tuple(dict.fromkeys(part.strip() for part in distributions.split(",")))
    for name in names:
        if name != "published":
            parse_distribution(name)
    sections: dict[str, type[Settings]] = {"test_time": WeightLearning, "views": Views, "known_prior": KnownPrior}
    values: dict[str, dict[str, Any]] = {section: {} for section in sections}
    rest = []
    for word in overrides:
        section = word.split(".")[0]
        if section not in sections or "=" not in word:
            rest.append(word)
            continue
        override = parse([word])[1][0]
        values[section][override.key_or_group.removeprefix(f"{section}.")] = override.value()
    for section, model in sections.items():
        for name in values[section]:
            if name not in model.model_fields:
                near = difflib.get_close_matches(name, model.model_fields, 1)
                hint = f"did you mean {section}.{near[0]}?" if near else f"known: {', '.join(model.model_fields)}"
                raise ValueError(f"{section}.{name}: unknown key; {hint}")
    return Request(rule, given, names, values["test_time"], values["views"], values["known_prior"], rest)


def _settings(section: str, model: type[S], published: Mapping[str, Any], asked: Mapping[str, Any]) -> S:
    """Published values with what was asked for on top."""
    try:
        return model(**dict(published) | dict(asked))
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else ""
        found = f".{name} = {asked[name]}" if name in asked else ""
        raise ValueError(f"{section}{found}: {problem['msg'].removeprefix('Value error, ')}") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        near = difflib.get_close_matches(text, RULES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--weights {text}: needed {', '.join(RULES)}, or a number for each expert, e.g. 0.2,0.3,0.5{hint}"
        ) from None
    if not all(0 <= number <= 1 for number in numbers) or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(
            f"--weights {text}: found a sum of {sum(numbers):g}; needed numbers of 0 or more that sum to 1"
        )
    return numbers


def _plain(value: Any) -> Any:
    """Without what JSON has no word for: a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
