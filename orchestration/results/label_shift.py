"""`expertail evaluate RUN --weights ... --distribution ...`: a saved run on test sets of other class distributions.

    logits of every image of the split, once                          [E, N, C]
    for each distribution, which is a subset of the split's images
        learn weights without labels, where asked for                 two more views of every image per pass
        find the weights of the oracle, with labels
        score every weighting, and every expert alone, by class group
    table, picture and numbers

Weights are learnt and compared on the logits in memory: 4 bytes x E experts x N images x C classes, three times over
while they are learnt. Nothing of the run is changed.

Shapes: E experts, N images of the whole split, C classes; 2 views.
"""

from __future__ import annotations

import difflib
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
    WeightChoice,
    WeightLearning,
    choose_weights,
    class_prior,
    combine,
    correct_for_prior,
    disagreement,
    oracle_weights,
)
from experts.augmentation.views import ViewMaker, Views, default_views
from experts.batches import share
from experts.data.keyed_random import key, permutation
from experts.data.label_shift import Distribution, distribution_positions, parse_distribution, published_distributions
from experts.losses.class_weights import trained_with
from experts.precision import at_least_float32
from experts.registry import Settings, piece
from orchestration.config.compose import from_yaml
from orchestration.config.messages import say
from orchestration.config.recipe import StageConfig
from orchestration.config.run_config import RunConfig
from orchestration.config.words import parse
from orchestration.results.label_shift_table import WEIGHTINGS, distributions_table, draw_distributions
from orchestration.results.saved_run import SavedRun, open_run, same_threads, stages_to_measure
from orchestration.storage.files import CONFIG

AS_TRAINED, UNIFORM, LEARNT, GIVEN, KNOWN, ORACLE = WEIGHTINGS
RULES = ("uniform", "test-time", "known-prior")
S = TypeVar("S", bound=Settings)
CHECK_PASS = 0  # the pass whose views only check the weights; passes that learn count from 1


class KnownPrior(Settings):
    """Settings of the correction for a known test distribution."""

    trained: Literal["auto", "uniform", "train"] | tuple[Literal["uniform", "train"], ...] = "auto"
    """The class distribution that each expert's softmax is trained for: that of the training set, or uniform where
    training is balanced. One word for all experts, or one each. auto: by the objective of the last stage, see
    `trained_priors`."""


@dataclass(frozen=True)
class Request:
    """The command line, read and checked.

    Attributes:
        rule: "uniform", "test-time", "known-prior" or "given".
        given: the weights, for "given".
        names: of the distributions.
        learning, views, known_prior: keys that differ from the published values.
        rest: overrides of the run's config.
    """

    rule: str
    given: tuple[float, ...] | None
    names: tuple[str, ...]
    learning: dict[str, Any]
    views: dict[str, Any]
    known_prior: dict[str, Any]
    rest: list[str]


def evaluate_distributions(
    run: str, weights: str, distributions: str, which: str, split: str, overrides: list[str], stage: str | None = None
) -> str:
    """Weight the experts by several rules and compare the rules on several class distributions.

    The numbers are saved as evaluation/<rule>.json, the picture as report/<rule>.png (`test-time`, `test_time`). Where
    the recipe has several final stages, each has its own below evaluation/<stage>/ and report/<stage>/.

    Args:
        run: the run folder.
        weights: "uniform", "test-time", "known-prior", or numbers separated by commas.
        distributions: names separated by commas, or "published".
        which: "best" or "last", of the run's models.
        split: "test" or "val".
        overrides: `a.b=value` for `test_time.*`, `views.*`, `known_prior.*`, and for keys that `open_run` takes.
        stage: the final stage to measure; None for all.

    Returns:
        A table with legend and warnings, and the paths of numbers and picture; one after the other for each stage.

    Raises:
        ValueError: `open_run` refuses the run; a rule, distribution or key is unknown; weights are not one per expert,
            0 or more, with sum 1; a distribution given by name would leave a class without an image.
    """
    # The command line is checked before the model and the data are opened, which takes seconds.
    request = _request(weights, distributions, overrides)
    texts = []
    saved: SavedRun | None = None
    for final in stages_to_measure(run, stage):
        saved = open_run(run, which, split, request.rest, final) if saved is None else saved.with_model(which, final)
        texts.append(_evaluate(saved, request, weights))
    return "\n\n".join(texts)


def _evaluate(saved: SavedRun, request: Request, weights: str) -> str:
    names = saved.model.description.expert_names
    if request.given is not None and len(request.given) != len(names):
        raise ValueError(
            f"--weights {weights}: {len(request.given)} numbers; the run has {len(names)} experts, "
            f"{', '.join(names)}; give one for each, in this order"
        )

    with same_threads(saved.config), torch.no_grad():
        result = _measure(saved, request)
    result = _finite(result)

    name = file_name(request.rule, saved.which, saved.split).removesuffix(".json")
    picture = saved.folder / "report" / saved.stage / f"{name.replace('-', '_')}.png"
    return "\n".join([distributions_table(result), "", saved.save(name, result), draw_distributions(picture, result)])


def file_name(rule: str, which: str, split: str) -> str:
    """Return the name of the file that holds a rule's results of a model on a split.

    The usual evaluation has the short name; one of another model or split must not replace it.
    """
    return f"{rule}.json" if (which, split) == ("best", "test") else f"{rule}-{which}-{split}.json"


def _measure(saved: SavedRun, request: Request) -> dict[str, Any]:
    config, description = saved.config, saved.model.description
    # The published settings of the data set, changed by those of the command line.
    learning = _settings("test_time", WeightLearning, PUBLISHED.get(config.dataset.name, {}), request.learning)
    views = _settings("views", Views, default_views(config.dataset), request.views)
    known = _settings("known_prior", KnownPrior, {}, request.known_prior)
    trained_EC, trained_for = None, list[str]()
    if known.trained != "auto" or config.method.gives_probabilities(saved.final):
        trained_EC, trained_for = trained_priors(config, known, saved.data["counts"], saved.final)
    elif request.rule == "known-prior":
        raise ValueError(
            "--weights known-prior: corrects probabilities, and this run's loss trains none, since its scores only "
            "rank; needed a run with a softmax loss; or say what its experts are trained for: known_prior.trained=train"
        )

    # The networks see every image once here; all distributions and weightings share the logits.
    parts, skipped = _positions(saved, request.names)
    logits_ENC, own_NC, labels_N = _logits(saved)
    learnt: dict[str, tuple[WeightChoice, Learner]] = {}
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
        **saved.origin(),
        "rule": request.rule,
        "dataset": config.dataset.name,
        "method": config.method.name,
        "run": saved.title,
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
    trained_EC: np.ndarray | None,
) -> dict[str, Any]:
    """Score every weighting and every expert alone on one distribution; the weights of the oracle are found here."""
    description, counts = saved.model.description, saved.data["counts"]
    counts_C = np.bincount(labels_N.numpy(), minlength=description.num_classes)
    target_C = class_prior(counts_C)  # known to the correction and the oracle, and to nothing that is learnt
    logits_ENC, own_NC, labels_N = (values.to(saved.device) for values in (logits_ENC, own_NC, labels_N))
    weights = {**rules, ORACLE: oracle_weights(logits_ENC, labels_N, list(rules.values()))}

    # In batches, because each member has logits of its own, and N x C of them may not fit on the device.
    scores = Scores()
    size = saved.config.evaluation_batch_size(saved.device.type)
    for part in (slice(first, first + size) for first in range(0, len(labels_N), size)):
        logits_EBC = logits_ENC[:, part]
        members = {AS_TRAINED: own_NC[part]}
        if trained_EC is not None:
            members[KNOWN] = correct_for_prior(logits_EBC, target_C, trained_EC).mean(dim=0)
        members |= {rule: combine(torch.tensor(weights_E), logits_EBC) for rule, weights_E in weights.items()}
        alone = {f"{name} alone": z_BC for name, z_BC in zip(description.expert_names, logits_EBC, strict=True)}
        scores.update({rule: members[rule] for rule in WEIGHTINGS if rule in members} | alone, labels_N[part])
    probabilities = saved.config.method.gives_probabilities(saved.final)
    return {**scores.result(counts, saved.cuts, probabilities), "test_counts": counts_C.tolist(), "weights": weights}


def _group_sizes(saved: SavedRun) -> dict[str, int]:
    groups = (saved.data.get("groups") or {}).get("by_count") or {}
    return {group: len(ids) for group, ids in groups.items()}


def _positions(saved: SavedRun, names: tuple[str, ...]) -> tuple[dict[Distribution, np.ndarray], dict[str, str]]:
    """Choose the images of every distribution, from the most forward to the most backward.

    Returns:
        The positions of each distribution's images, and the reason for each published one that is left out.

    Raises:
        ValueError: a distribution given by name leaves a class without an image.
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
            # A small test set cannot have the steepest of the published ones; the table names those that are left out.
            skipped[distribution.name] = str(problem).removeprefix(f"--distribution {distribution.name}: ")
            continue
        parts[distribution] = positions
    return parts, skipped


def _logits(saved: SavedRun) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logits [E, N, C], the run's own scores [N, C] and labels [N] of the split; on the CPU."""
    logits, own, labels = [], [], []
    for images_B3HW, labels_B in saved.batches():
        outputs = saved.outputs(images_B3HW)
        logits.append(at_least_float32(outputs.logits_EBC))
        own.append(saved.model.aggregator.members(outputs)["ensemble"])
        labels.append(labels_B)
    return torch.cat(logits, dim=1).cpu(), torch.cat(own).cpu(), torch.cat(labels).cpu()


def _learn(
    saved: SavedRun, learning: WeightLearning, views: Views, parts: Mapping[Distribution, np.ndarray]
) -> dict[str, tuple[WeightChoice, Learner]]:
    """Learn weights for every distribution, side by side: the views of an image serve all that contain it.

    A pass draws two new views of every image and takes one step per batch for each distribution. Once all have ended,
    two more views decide whether the learnt weights are better than uniform ones.
    """
    description = saved.model.description
    seed, num_experts = learning.seed, len(description.expert_names)
    maker = ViewMaker(
        saved.store.to(saved.device), saved.dataset.config, views, seed=seed, device=saved.device, dtype=saved.dtype
    )
    learners = {distribution: Learner(num_experts, learning) for distribution in parts}
    for number in range(1, learning.epochs + 1):
        # Views are made only of images in distributions that still learn.
        active = [distribution for distribution, learner in learners.items() if not learner.stopped]
        if not active:
            break
        say(f"learning weights without labels: pass {number} of {learning.epochs}")
        seen_2ENC = _view_logits(saved, maker, number, np.unique(np.concatenate([parts[d] for d in active])))
        for distribution in active:
            # Keyed by the name of the distribution, so its weights do not depend on which others are measured with it.
            order = permutation(key(seed, "test-time order", distribution.name, number), len(parts[distribution]))
            rows = torch.from_numpy(parts[distribution][order])
            for batch in rows.split(learning.batch_size):
                with torch.enable_grad():  # for the weights; the logits were computed without
                    learners[distribution].step(seen_2ENC(batch))
            learners[distribution].end_pass()

    say("checking the weights on views that were not learnt from")
    # Learning can end worse than it began; then `settle` falls back to uniform weights.
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
        guarded = choose_weights(learner, uniform / len(rows), learnt / len(rows), description.num_classes)
        settled[distribution.name] = guarded, learner
    return settled


def _view_logits(saved: SavedRun, maker: ViewMaker, number: int, positions: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Compute the logits of two views of these images. Return a function: positions in the split -> [2, E, B, C]."""
    size = saved.config.evaluation_batch_size(saved.device.type)
    cuts = [share(len(positions), part, -(-len(positions) // size)) for part in range(-(-len(positions) // size))]
    views = []
    for view in range(2):
        batches = (maker.make(positions[first:last], number, view) for first, last in cuts)
        views.append(torch.cat([at_least_float32(saved.outputs(b).logits_EBC) for b in batches], dim=1).cpu())
    logits_2EUC = torch.stack(views)
    # From a position in the split to its row here; only positions that have one are asked for.
    place = torch.full((len(saved.store),), -1, dtype=torch.int64)
    place[torch.from_numpy(positions)] = torch.arange(len(positions))
    return lambda rows: logits_2EUC[:, :, place[rows]]


def trained_priors(config: RunConfig, known: KnownPrior, counts: list[int], final: str) -> tuple[np.ndarray, list[str]]:
    """Return the class distribution that each expert's softmax is trained for.

    With auto, the objective of the last stage with steps decides. Most objectives aim at a balanced test set and are
    taken at their word. One that learns the training distribution on every expert does so only from a sampler that
    keeps it, and only until a stage without steps replaces the head, as the classifiers of such stages are balanced.

    Args:
        config: of the run.
        known: the settings.
        counts: training images per class.
        final: the stage that the experts are of.

    Returns:
        Log priors, float64 [E, C] up to a constant, and a word for each expert.

    Raises:
        ValueError: there are words for another number of experts, or a run that the experts come from is gone.
    """
    num_experts = len(config.method.names_in(final))
    log_train_C = np.log(class_prior(np.asarray(counts)))
    if known.trained == "auto":
        stage = _last_stage_with_steps(config, final)
        if stage is not None:
            found_EC, of_each = stage.objective.trained_log_prior(
                torch.tensor(counts), torch.from_numpy(log_train_C), num_experts
            )
            if set(of_each) == {"train"} and stage.class_weights is not None:
                weight_C = stage.class_weights.of(torch.tensor(counts))
                found_EC, of_each = trained_with(weight_C, found_EC[0], num_experts)
            from_train = any(word.startswith("train") for word in of_each)
            if not from_train or piece("sampler", stage.sampler.name).keeps_distribution:
                return found_EC.numpy(), list(of_each)
        words = ["uniform"] * num_experts
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


def _last_stage_with_steps(config: RunConfig, stage: str) -> StageConfig | None:
    """Return the last stage with steps that a stage's weights come from; None where its head was replaced since."""
    method = config.method
    own, source = method.stages[stage], method.starts_from(stage)
    if own.epochs:
        return own
    assert source is not None, "a stage without steps begins with weights"
    if source.stage is not None:
        return _last_stage_with_steps(config, source.stage) if _same_head(config, stage, config, source.stage) else None
    folder = source.folder(config.run.dir)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"known_prior.trained = auto: stage {stage} begins with run {folder}, whose {CONFIG} is gone; needed what "
            f"it was trained with; set known_prior.trained=train or known_prior.trained=uniform"
        )
    other = from_yaml(folder / CONFIG)
    before = other.method.final
    return _last_stage_with_steps(other, before) if _same_head(config, stage, other, before) else None


def _same_head(config: RunConfig, stage: str, before: RunConfig, earlier: str) -> bool:
    return bool(config.method.head_in(stage) == before.method.head_in(earlier))


def _request(weights: str, distributions: str, overrides: list[str]) -> Request:
    """Read the command line; refuse what is wrong whatever the run, before anything is loaded."""
    given = None
    rule = weights
    if weights not in RULES:
        rule, given = "given", _numbers(weights)

    names = tuple(dict.fromkeys(part.strip() for part in distributions.split(",")))
    for name in names:
        if name != "published":
            parse_distribution(name)

    # Keys of the three sections belong to this evaluation; all others are overrides of the run's config.
    sections: dict[str, type[Settings]] = {"test_time": WeightLearning, "views": Views, "known_prior": KnownPrior}
    values: dict[str, dict[str, Any]] = {section: {} for section in sections}
    rest = []
    for word in overrides:
        section = word.split(".")[0]
        if section not in sections or "=" not in word:
            rest.append(word)
            continue
        override = parse([word]).values[0]
        values[section][override.key_or_group.removeprefix(f"{section}.")] = override.value()

    for section, model in sections.items():
        for name in values[section]:
            if name not in model.model_fields:
                near = difflib.get_close_matches(name, model.model_fields, 1)
                hint = f"did you mean {section}.{near[0]}?" if near else f"known: {', '.join(model.model_fields)}"
                raise ValueError(f"{section}.{name}: unknown key; {hint}")
    return Request(rule, given, names, values["test_time"], values["views"], values["known_prior"], rest)


def _settings(section: str, model: type[S], published: Mapping[str, Any], asked: Mapping[str, Any]) -> S:
    """Return the published values, overridden by those asked for."""
    try:
        return model(**dict(published) | dict(asked))
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else ""
        found = f".{name} = {asked[name]}" if name in asked else ""
        raise ValueError(f"{section}{found}: {problem['msg'].removeprefix('Value error, ')}") from None


def _numbers(text: str) -> tuple[float, ...]:
    """Read weights that are given as numbers separated by commas."""
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


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None: JSON cannot write them."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
