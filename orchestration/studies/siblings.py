"""Runs of a study that learn from other runs of it, or begin with their weights.

A word such as `method.stages.train.teachers.teacher.run=sibling:ride` names a recipe of the study, by the name that its
runs have without values and seed. Each run takes the one with its own values and seed, a reference that recipe's
reference:

    sibling:ride   in ride_distill-ratio50-s1            ->  sibling:ride-ratio50-s1
                   in ride_distill-balanced-ratio50-s1   ->  sibling:ride-balanced-ratio50-s1
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestration.config.paths import SIBLING
from orchestration.config.recipe_checks import head_problem
from orchestration.config.run_config import RunConfig
from orchestration.studies.points import Point

_NAMED = re.compile(rf"{SIBLING}([\w.+-]+)")


@dataclass(frozen=True)
class Named:
    """What the runs of a recipe at some values of the axes are called.

    Attributes:
        recipe: the first part of their names.
        extra: parts that tell values.
        values: of the axes that `recipe` does not say, as words.
        at: values of all axes, as words.
    """

    recipe: str
    extra: tuple[str, ...]
    values: frozenset[str]
    at: frozenset[str]

    def run(self, seed: int, *, reference: bool = False) -> str:
        """Return the name of a run."""
        return "-".join([self.recipe, *(["balanced"] if reference else []), *self.extra, f"s{seed}"])


def siblings_in(words: Sequence[str]) -> list[str]:
    """Return the names that stand behind `sibling:` in words."""
    return [name for word in words for name in _NAMED.findall(word)]


def with_siblings(words: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """Return words with other names behind `sibling:`; those that `names` lacks stay."""
    return tuple(_NAMED.sub(lambda match: f"{SIBLING}{names.get(match[1], match[1])}", word) for word in words)


class Siblings:
    """Finds the run that a recipe's name stands for.

    Args:
        recipes: what the runs of each combination of the study are called, and its config with the first seed.
    """

    def __init__(self, recipes: Sequence[tuple[Named, RunConfig]]) -> None:
        self._recipes = recipes
        self._problems: dict[str, None] = {}

    def fill_in(
        self, words: tuple[str, ...], user: Named, config: RunConfig, seed: int, *, reference: bool = False
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return words with names of runs in the place of names of recipes, and these runs.

        Args:
            words: of a run.
            user: what it is called.
            config: of it.
            seed: of it.
            reference: whether it is one.
        """
        runs = dict[str, str]()
        for recipe in siblings_in(words):
            found = [(named, its) for named, its in self._recipes if named.recipe == recipe and named.values <= user.at]
            if len(found) == 1:
                runs[recipe] = found[0][0].run(seed, reference=reference)
                self._problems |= dict.fromkeys(f"{user.recipe}: {one}" for one in promised_problems(config, *found[0]))
            else:
                self._problems[f"{user.recipe}: {SIBLING}{recipe}: {self._problem(recipe, user, len(found))}"] = None
        return with_siblings(words, runs), tuple(runs.values())

    def _problem(self, recipe: str, user: Named, found: int) -> str:
        known = list(dict.fromkeys(named.recipe for named, _ in self._recipes if named.recipe != user.recipe))
        if found:
            return f"{found} recipes are called so; needed a label for one of them"
        if recipe in known:
            return f"excluded at {' '.join(sorted(user.at))}; needed both there, or none"
        near = difflib.get_close_matches(recipe, known, 1)
        hint = f"; did you mean {SIBLING}{near[0]}?" if near else ""
        return f"no recipe of the study{hint}; needed one of {', '.join(known)}, or the path of a run outside it"

    def problems(self, points: Sequence[Point]) -> Iterator[str]:
        """Yield names that stand for no run, or for one that does not fit, and runs that would wait for themselves."""
        yield from self._problems
        # Runs that need nobody go, then those that needed only these; what is left waits for itself.
        after = {point.run: point.after for point in points}
        yield from (
            f"{run}: needs {one}, which is no run" for run, own in after.items() for one in own if one not in after
        )
        left = {run: set(needed) & after.keys() for run, needed in after.items()}
        while free := [run for run, needed in left.items() if not needed]:
            left = {run: needed.difference(free) for run, needed in left.items() if run not in free}
        if left:
            yield f"{', '.join(left)}: each needs another of them, so that none can begin; needed a first one"


def promised_problems(config: RunConfig, named: Named, sibling: RunConfig) -> Iterator[str]:
    """Yield why a stage cannot begin with, or learn from, a run that is not trained yet, as far as its config tells.

    Args:
        config: of the run that needs it.
        named: what the sibling is called.
        sibling: its config.
    """
    for stage, settings in config.method.stages.items():
        for source in settings.sources:
            if source.sibling is None or source.sibling != named.recipe:
                continue
            finals = sibling.method.finals
            at = f"method.stages.{stage}: {source.run}"
            if source.final is not None and source.final not in finals:
                known = ", ".join(finals) or "none, so leave final out"
                yield f"{at}: it has no final stage {source.final}; needed one of its own: {known}"
            elif source is settings.start_from:
                final = source.final or sibling.method.final
                if problem := head_problem(config.method, stage, sibling.method.head_in(final).name):
                    yield f"{at}: {problem}"
