"""Pieces with one number that may be chosen on the validation split."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

Candidates = Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], Field(min_length=1)]
"""Type of the field `candidates` of such a piece's config: finite numbers of 0 or more."""


def tenths(last: int) -> tuple[float, ...]:
    """Return 0, 0.1, ..., last / 10, each the float nearest to its decimal."""
    return tuple(k / 10 for k in range(last + 1))


class Tunable:
    """A head or an aggregator whose config may leave one number open with `null`.

    The number is then chosen on the validation split, never on the test split: of `candidates()`, the one with the best
    mean of per-class accuracies. Without a validation split, and until the choice is made, the published number holds.
    """

    tuned_key: ClassVar[str]
    """Key of the config that may be null."""
    published: ClassVar[float]
    """The number that holds while none is set or chosen."""
    origin: ClassVar[str]
    """Where that number was published, for the report."""
    value: float
    """The number in use; may be set."""
    config: Any

    def take_number(self, config: Any) -> None:
        """Use the config's number, or the published one where the config leaves it open."""
        self.config = config
        number = getattr(config, self.tuned_key)
        self.value = self.published if number is None else number

    def candidates(self) -> tuple[float, ...]:
        """Return the numbers to try, ascending: the config's `candidates` and the published one."""
        return tuple(sorted({*self.config.candidates, self.published}))
