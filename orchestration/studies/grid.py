"""Lay out a study: its recipes, axes and seeds become runs with words, labels and names. Nothing is started.

recipes x axes -> combinations, less those excluded        `_combinations`
               -> configs, composed as `train` does         `_compose`
    x seeds    -> points with names and identities          `_points_of`
               +  runs on balanced data for references      `_references`
All problems are told in one message.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs import VANILLA
from experts.data.cpus import usable_cpus
from orchestration.cluster.placement import bundle_of, largest_share, shape_of
from orchestration.config.compose import compose
from orchestration.config.identity import config_hash
from orchestration.config.paths import expand
from orchestration.config.run_config import RunConfig, name_problems
from orchestration.config.secrets import redact
from orchestration.config.words import message
from orchestration.reports.asked import Asked, report_problems
from orchestration.results.text import plural
from orchestration.runs.admission import admit
from orchestration.storage.location import run_path
from orchestration.storage.url_store import is_url
from orchestration.studies.points import Point
from orchestration.studies.shared_stages import stage_digests
from orchestration.studies.siblings import Named, Siblings, siblings_in, with_siblings
from orchestration.studies.study_config import PARTS, StudyConfig, default_name, in_label, plain_word, short_key
from orchestration.tracking.uri import default_uri

BALANCED = "dataset.balanced"
_NONE = "none"
_EXPERIMENT = "tracking.experiment="
_NAME_CHARACTERS = 60  # of a value, in the name of its run
_OF_A_RECIPE = ("method", "mix=", "then=", "protocol=")  # words that plain cross-entropy does not share
_SHOWN = 3  # recipes that one problem names
_GROUPS_BY_VALUE = ("dataset", "backbone", "pace", "protocol")  # whose choice alone says what it is


@dataclass(frozen=True)
class Grid:
    """A study, laid out.

    Attributes:
        study: as it was asked for.
        name: of the study.
        folder: of the study, absolute; its runs lie in it.
        points: in the order of recipes, axes, seeds; references last.
        baseline: pairs of a label that the row to compare with has; None without one.
        defaults: words that every run gets beside its own, which change no result: where it is tracked.
        address: of the cluster, as the configs name it.
    """

    study: StudyConfig
    name: str
    folder: Path
    points: tuple[Point, ...]
    baseline: Mapping[str, str] | None
    defaults: tuple[str, ...]
    address: str | None

    def named(self, name: str) -> Grid:
        """Return the same study by another name, in a folder of its own."""
        defaults = tuple(word.replace(f"{_EXPERIMENT}{self.name}", f"{_EXPERIMENT}{name}") for word in self.defaults)
        return replace(self, name=name, folder=self.folder.with_name(name), defaults=defaults)


@dataclass(frozen=True)
class _Combination:
    """A recipe with a value of every axis; all its seeds are alike but for the seed."""

    title: str
    words: tuple[str, ...]
    label: dict[str, str]
    extra: tuple[str, ...]  # of its name, beside method, mix and then
    stem: str | None  # of its name, in the place of method, mix and then: a recipe's own label
    values: frozenset[str]  # of the axes, as words

    def named(self, config: RunConfig) -> Named:
        """Return what its runs are called."""
        return _named(self, self.stem or _recipe_name(config), self.extra)


def lay_out(study: StudyConfig, gpu_share: float | None = None, *, files: bool = True) -> Grid:
    """Lay out a study.

    Args:
        study: as asked for.
        gpu_share: CPUs for a worker with a GPU, where its config leaves them open; None: not known yet.
        files: whether files that the configs name must be there; a plan is also made where they are not.

    Raises:
        ValueError: everything that is wrong with it.
    """
    problems = [*_word_problems(study), *report_problems(study.report)]
    combinations = [] if problems else list(_combinations(study, problems))
    composed = {} if problems else _compose(study, combinations, gpu_share, problems, files)
    if problems:
        raise ValueError(message(" ".join(filter(None, ["study", study.name])), problems))

    siblings = Siblings([(one.named(composed[one.title][1]), composed[one.title][1]) for one in combinations])
    points = [point for one in combinations for point in _points_of(study, one, *composed[one.title], siblings)]
    if study.references:
        points += _references(study, combinations, points, siblings, gpu_share, problems, files)
    first = next(iter(composed.values()))[1]
    name = study.name or default_name(study, first.method.name, first.dataset.name)
    baseline = _baseline(study, points)
    problems += [*_duplicates(points), *_unknown_recipes(study, baseline, points), *_place_problems(name, composed)]
    problems += siblings.problems(points)
    if problems:
        raise ValueError(message(f"study {name}", problems))
    named = first.model_copy(update={"run": first.run.model_copy(update={"name": name})})
    return Grid(study, name, run_path(named), tuple(points), baseline, _defaults(name, first), first.cluster.address)


def label_of(words: Sequence[str]) -> dict[str, str]:
    """Return words as pairs of a label; no mixing and no further stage are `none`.

    Passwords are left out: names of runs and folders are made of labels.
    """
    pairs = (word.partition("=")[::2] for word in words)
    return {key: redact(in_label(key, value)) for key, value in pairs}


# Combinations


def _word_problems(study: StudyConfig) -> Iterator[str]:
    common = {word.partition("=")[0] for word in study.words}
    for key in ("run.name", "seed"):
        if key in common or key in study.axes or any(key in label_of(r.words.split()) for r in study.recipes):
            where = "study.name" if key == "run.name" else "seeds, or seed=0,1,2 on the command line"
            yield f"{key}: runs of a study are named and seeded by it; needed {where}"
    if "cluster" in study.axes or any(key.startswith(("cluster.", "run.", "tracking.")) for key in study.axes):
        key = next(k for k in study.axes if k.startswith(("cluster", "run.", "tracking.")))
        yield f"{key}: changes no result, so that its runs would be the same; needed one value for all"
    for key, values in study.axes.items():
        if not values:
            yield f"axes.{key}: no value; needed at least one"
        if key in common:
            yield f"{key}: set twice, to several values and for all runs; leave one out"
        for recipe in study.recipes:
            if key in label_of(recipe.words.split()):
                yield f"{key}: set twice, by an axis and by recipe {recipe.words!r}; leave one out"
    by_all = set.intersection(*(set(label_of(one.words.split())) for one in study.recipes)) if study.recipes else set()
    for key in sorted(by_all & common):
        yield f"{key}: set for all runs, and by every recipe, which wins; leave one out"


def _combinations(study: StudyConfig, problems: list[str]) -> Iterator[_Combination]:
    """Yield every recipe with every combination of values that is not excluded; note an empty grid."""
    recipes = [(tuple(recipe.words.split()), recipe.label) for recipe in study.recipes] or [((), None)]
    keys = dict.fromkeys(key for words, _ in recipes for key in label_of(words) if key in PARTS)
    found, unmatched = 0, [label_of([f"{k}={v}" for k, v in pairs.items()]) for pairs in study.exclude]
    exclusions, common = list(unmatched), label_of(study.words)
    for (words, shown), values in itertools.product(recipes, itertools.product(*study.axes.values())):
        axes = dict(zip(study.axes, values, strict=True))
        own = label_of(words)
        varied = {
            **{key: own.get(key, _NONE) for key in keys},
            **own,
            **label_of([f"{k}={v}" for k, v in axes.items()]),
        }
        label = {**({"recipe": shown} if shown else {}), **varied}
        if excluding := [pairs for pairs in exclusions if pairs.items() <= {**common, **label}.items()]:
            unmatched = [pairs for pairs in unmatched if pairs not in excluding]
            continue
        found += 1
        # A label stands for the words of its recipe; what axes say differs between its runs.
        told = varied if shown is None else {key: value for key, value in varied.items() if key in study.axes}
        extra = tuple(_part(key, value) for key, value in told.items() if key not in PARTS or shown is not None)
        set_ = [f"{key}={'null' if key in PARTS and value == _NONE else value}" for key, value in axes.items()]
        mine = tuple(map(plain_word, words))
        title = " ".join([*mine, *set_]) or "its one recipe"
        stem = None if shown is None else _plain_name(shown)
        at = frozenset(f"{key}={value}" for key, value in axes.items())
        yield _Combination(title, (*study.words, *mine, *set_), label, extra, stem, at)
    example = " ".join(f"{key}={value}" for key, value in label.items()) or "method=ce,ride as an axis"
    for pairs in unmatched:
        shown_pairs = ", ".join(f"{key}: {value}" for key, value in pairs.items())
        problems.append(f"exclude {{{shown_pairs}}}: no run has it; needed pairs of one, as of {example}")
    if not found:
        problems.append("no run is left: every combination is excluded; needed at least one; shorten `exclude`")


def _part(key: str, value: str) -> str:
    """Return the part of a run's name that a value is: ratio50."""
    text = value if key in _GROUPS_BY_VALUE else f"{short_key(key)}{value}"
    return _plain_name(text)


def _plain_name(text: str) -> str:
    """Return what stands in the name of a folder for some text."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")[:_NAME_CHARACTERS] or "_"


def _named(combination: _Combination, recipe: str, extra: tuple[str, ...]) -> Named:
    # The name of a recipe without a label says method, mix and then.
    said = () if combination.stem else [word for word in combination.values if word.partition("=")[0] in PARTS]
    return Named(recipe, extra, combination.values.difference(said), combination.values)


def _recipe_name(config: RunConfig) -> str:
    return re.sub(r"[^\w.+-]+", "_", config.method.name)


# Configs


def _compose(
    study: StudyConfig,
    combinations: Sequence[_Combination],
    gpu_share: float | None,
    problems: list[str],
    files: bool,
) -> dict[str, tuple[tuple[str, ...], RunConfig]]:
    """Return words and config of each combination by title, with the first seed; note each problem once."""
    composed, found = {}, dict[str, list[str]]()
    for combination in combinations:
        try:
            composed[combination.title] = compose_as_run(combination.words, study.seeds[0], gpu_share, files=files)
        except ValueError as problem:
            lines = str(problem).splitlines()
            for line in [text.strip() for text in lines[1:]] or lines:  # the first counts them, and has all words
                found.setdefault(line, []).append(combination.title)
    for line, titles in found.items():
        more = f" and {len(titles) - _SHOWN} more" if len(titles) > _SHOWN else ""
        whose = "every recipe" if len(titles) == len(combinations) else "; ".join(titles[:_SHOWN]) + more
        told = len(combinations) == 1 or line.startswith(f"{whose}:")
        problems.append(line if told else f"{whose}: {line}")
    return composed


def compose_as_run(
    words: Sequence[str], seed: int, gpu_share: float | None = None, *, files: bool = True
) -> tuple[tuple[str, ...], RunConfig]:
    """Return the words of a run of a study, without its seed, and its config, admitted but for `files`.

    Raises:
        ValueError: they make no run that can work.
    """
    # First, so that a saved run's name, which words with method.like take over, ends with the seed.
    words = tuple(words)
    config = compose([*words, f"seed={seed}"]).config
    if is_url(config.run.dir):
        raise ValueError(
            f"run.dir = {config.run.dir}: a study compares run folders on disk; needed a folder; set run.dir=/..., or "
            f"train the runs one by one"
        )
    if (cpus := _cpus(config, gpu_share)) is not None:
        words += (f"cluster.cpus_per_worker={cpus:g}",)
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"cpus_per_worker": cpus})})
    if files:
        admit(config, siblings_in(words))
    else:
        shape_of(config.method.num_experts, config.cluster)
    return words, config


def _cpus(config: RunConfig, gpu_share: float | None) -> float | None:
    """Return the CPUs of a worker where a config leaves them open: n runs of one thread beat one run of n threads."""
    if config.cluster.cpus_per_worker is not None:
        return None
    if config.cluster.gpus_per_worker:
        return gpu_share
    share = float(config.engine.threads or 1)
    if config.cluster.named_address is None:  # a run of many workers must still fit on this machine
        share = min(share, largest_share(config.cluster.workers, [usable_cpus()]))
    return share


def _points_of(
    study: StudyConfig, combination: _Combination, words: tuple[str, ...], config: RunConfig, siblings: Siblings
) -> Iterator[Point]:
    named = combination.named(config)
    for seed in study.seeds:
        mine, after = siblings.fill_in(words, named, config, seed)
        own = compose([*mine, f"seed={seed}"]).config if after else config
        yield _point(named.run(seed), combination.label, seed, mine, own, after=after)


def _point(
    run: str,
    label: Mapping[str, str],
    seed: int,
    words: tuple[str, ...],
    config: RunConfig,
    role: str = "run",
    after: tuple[str, ...] = (),
) -> Point:
    seeded = config.model_copy(update={"seed": seed, "run": config.run.model_copy(update={"name": run})})
    cluster = config.cluster
    bundle = bundle_of(cluster, cluster.cpus_per_worker or 1.0)
    need = tuple(sorted(bundle.items())), shape_of(config.method.num_experts, cluster).workers
    told = (*words, f"seed={seed}")
    return Point(run, label, seed, told, config_hash(seeded), stage_digests(seeded), role, need, after)


def _references(
    study: StudyConfig,
    combinations: Sequence[_Combination],
    points: Sequence[Point],
    siblings: Siblings,
    gpu_share: float | None,
    problems: list[str],
    files: bool,
) -> list[Point]:
    """Return runs on the balanced variant of the data, of equal total: of every recipe, and of plain cross-entropy.

    Those that are runs of the study already, or references of another recipe, are not there twice.
    """
    found = list[Point]()
    balanced = (f"{BALANCED}=true",) if study.references is True else study.references or ()
    for combination in combinations:
        plain = tuple(word for word in combination.words if not word.startswith(_OF_A_RECIPE))
        for asked, recipe in ((combination.words, True), ((f"method={VANILLA}", *plain), False)):
            try:
                words, config = compose_as_run((*asked, *balanced), study.seeds[0], gpu_share, files=files)
            except ValueError as problem:
                problems.append(f"reference on balanced data: {str(problem).splitlines()[-1].strip()}")
                return []
            label = dict(combination.label) if recipe else {
                key: {"method": VANILLA}.get(key, _NONE) if key in PARTS else value
                for key, value in combination.label.items()
                if key != "recipe" and not key.startswith("method.")
            }  # fmt: skip
            stem, extra = _recipe_name(config), tuple(part for _, part in _parts_of(label))
            named = combination.named(config) if recipe else _named(combination, stem, extra)
            for seed in study.seeds:
                mine, after = siblings.fill_in(words, named, config, seed, reference=True)
                own = compose([*mine, f"seed={seed}"]).config if after else config
                run = named.run(seed, reference=True)
                found.append(_point(run, label | {BALANCED: "true"}, seed, mine, own, "reference", after))
    return _without_repeats(found, points)


def _without_repeats(references: Sequence[Point], points: Sequence[Point]) -> list[Point]:
    """Leave out references that are runs of the study, or other references; what needs one of them needs these."""
    known = {point.identity: point.run for point in points}
    kept, instead = dict[int, Point](), dict[str, str]()
    for place, point in sorted(enumerate(references), key=lambda one: bool(one[1].after)):
        own = _renamed(point, {run: instead[run] for run in point.after if instead.get(run, run) != run})
        if own.identity not in known:
            known[own.identity] = own.run
            kept[place] = own
        instead[own.run] = known[own.identity]
    return [kept[place] for place in sorted(kept)]


def _renamed(point: Point, names: Mapping[str, str]) -> Point:
    """Return a point that needs runs of other names."""
    if not names:
        return point
    words = with_siblings(point.words, names)
    config = compose(list(words)).config
    after = tuple(names.get(run, run) for run in point.after)
    return replace(point, words=words, after=after, identity=config_hash(config), stages=stage_digests(config))


def _parts_of(label: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key, _part(key, value)) for key, value in label.items() if key not in (*PARTS, "recipe")]


# Checks


def _duplicates(points: Sequence[Point]) -> Iterator[str]:
    """Yield a problem for each pair of runs that would compute the same, or lie in one folder."""
    by_identity, by_name = dict[str, Point](), dict[str, Point]()
    for point in points:
        same, there = by_identity.setdefault(point.identity, point), by_name.setdefault(point.run, point)
        if same is not point:
            first, second = _told(same, point)
            yield f"{first} and {second}: the same run twice; leave one out"
        elif there is not point:
            first, second = _told(there, point)
            yield (
                f"{first} and {second}: both runs would be {point.run}; leave one out, or give one another label, or "
                f"split the study in two"
            )


def _told(one: Point, other: Point) -> tuple[str, str]:
    """Return what makes two runs differ, in words."""
    words = [" ".join(word for word in p.words if word not in (q.words)) for p, q in ((one, other), (other, one))]
    return words[0] or one.run, words[1] or other.run


def _baseline(study: StudyConfig, points: Sequence[Point]) -> dict[str, str] | None:
    """Return pairs of a label that the baseline has; None where it says nothing that tells runs apart.

    What a word on top of the file has made the same for all runs is no part of a label.
    """
    if study.baseline is None:
        return None
    if any(point.label.get("recipe") == study.baseline for point in points):
        return {"recipe": study.baseline}
    keys, common = {key for point in points for key in point.label}, label_of(study.words)
    asked = label_of(study.baseline.split())
    return {k: value for k, value in asked.items() if k in keys or common.get(k) != value} or None


def _unknown_recipes(study: StudyConfig, baseline: Mapping[str, str] | None, points: Sequence[Point]) -> Iterator[str]:
    """Yield a problem for each key that names a recipe which no run has."""
    asked = {} if baseline is None else {f"baseline = {study.baseline}": baseline}
    for number, one in enumerate(Asked.model_validate(study.report).evaluate):
        asked[f"report.evaluate.{number}.recipe = {one.recipe}"] = label_of(one.recipe.split())
    for key, pairs in asked.items():
        if not any(pairs.items() <= point.label.items() for point in points):
            labels = dict.fromkeys(" ".join(f"{k}={v}" for k, v in point.label.items()) for point in points)
            yield (
                f"{key}: no run has it; needed words of one of {plural(len(labels), 'recipe')}, e.g. "
                f"{next(filter(None, labels), 'method=ce,ride as an axis')}"
            )


def _place_problems(name: str, composed: Mapping[str, tuple[tuple[str, ...], RunConfig]]) -> Iterator[str]:
    """Yield what is wrong with the folders of study and runs."""
    config = next(iter(composed.values()))[1]
    if len({one.run.dir for _, one in composed.values()}) > 1:
        yield "run.dir: differs between recipes; needed one for the study"
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    yield from (problem.replace("run.name = ", "study.name = ", 1) for problem in name_problems(named))


def _defaults(name: str, config: RunConfig) -> tuple[str, ...]:
    """Return where the runs are tracked unless they say so: one store beside the study, one experiment for it."""
    tracking = config.tracking
    uri = [] if tracking.uri is not None else [f"tracking.uri={default_uri(expand(config.run.dir))}"]
    return (*uri, *([f"{_EXPERIMENT}{name}"] if tracking.experiment == "expertail" else []))
