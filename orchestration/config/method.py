"""The schema of a recipe, checked as a whole."""

from __future__ import annotations

from pydantic import model_validator

from orchestration.config.recipe import Recipe
from orchestration.config.recipe_checks import recipe_problems


class MethodConfig(Recipe):
    """A recipe whose parts fit together."""

    @model_validator(mode="after")
    def _pieces_fit(self) -> MethodConfig:
        problems = list(dict.fromkeys(recipe_problems(self)))
        if problems:
            raise ValueError("; ".join(problems))
        return self
