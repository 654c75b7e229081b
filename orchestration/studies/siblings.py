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
from orchestration.studies.points import Point

_NAMED = re.compile(rf"{SIBLING}([\w.+-]+)")


@dataclass(frozen=True)
class Named:
    """What the runs of a recipe at some values of the axes are called.

    Attributes:
        recipe: the first part of their names.
        extra: parts that tell values.
        values: of the axes, as words; a recipe's own parts are none.
    """

    recipe: str
    extra: tuple[str, ...]
    values: tuple[str, ...]

    def run(self, seed: int, *, reference: bool = False) -> str:
        """Return the name of a run."""
        return "-".join([self.recipe, *(["balanced"] if reference else []), *self.extra, f"s{seed}"])


def siblings_in(words: Sequence[str]) -> list[str]:
    """Return the names that stand behind `sibling:` in words."""
    return [name for word in words for name in _NAMED.findall(word)]


class Siblings:
    """Finds the run that a recipe's name stands for.

    Args:
        named: what the runs of each combination of the study are called, by its title.
    """

    def __init__(self, named: Mapping[str, Named]) -> None:
        self._named = {(one.recipe, one.values): one for one in named.values()}
        self._recipes = list(dict.fromkeys(one.recipe for one in named.values()))
        self._unknown: dict[str, None] = {}

    def fill_in(
        self, words: tuple[str, ...], user: Named, seed: int, *, reference: bool = False
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return words with names of runs in the place of names of recipes, and these runs.

        Args:
            words: of a run.
            user: what it is called.
            seed: of it.
            reference: whether it is one.
        """
        runs = dict[str, str]()
        for recipe in siblings_in(words):
            found = self._named.get((recipe, user.values))
            if found is None:
                self._unknown[self._problem(recipe, user)] = None
            else:
                runs[recipe] = found.run(seed, reference=reference)
        filled = (_NAMED.sub(lambda match: f"{SIBLING}{runs.get(match[1], match[1])}", word) for word in words)
        return tuple(filled), tuple(runs.values())

    def _problem(self, recipe: str, user: Named) -> str:
        if recipe in self._recipes:
            return f"{user.recipe}: {SIBLING}{recipe}: excluded at {' '.join(user.values)}; leave both out, or none"
        near = difflib.get_close_matches(recipe, self._recipes, 1)
        hint = f"; did you mean {SIBLING}{near[0]}?" if near else ""
        return f"{user.recipe}: {SIBLING}{recipe}: no recipe of the study{hint}; known: {', '.join(self._recipes)}"

    def problems(self, points: Sequence[Point]) -> Iterator[str]:
        """Yield names that stand for no run, and runs that would wait for themselves."""
        yield from self._unknown
        after = {point.run: point.after for point in points}
        for point in points:
            missing = [run for run in point.after if run not in after]
            if missing:
                yield f"{point.run}: needs {missing[0]}, which is no run of the study; add it"
        # Runs that need nobody go, then those that needed only these; what is left waits for itself.
        left = {run: set(needed) & after.keys() for run, needed in after.items()}
        while free := [run for run, needed in left.items() if not needed]:
            left = {run: needed.difference(free) for run, needed in left.items() if run not in free}
        if left:
            yield f"{', '.join(left)}: each needs another of them, so that none can begin; needed a first one"
