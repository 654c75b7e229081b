"""The configurations that the contract tests try a piece with. Each piece names its own, in its own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experts.registry import Settings, piece


@dataclass(frozen=True)
class Case:
    """One way to set up a piece. The tests of a kind read only the fields that the kind needs.

    Attributes:
        config: of the piece.
        num_experts: E.
        objective: config of the objective that a flow is tried with.
        head: config of the experts' heads, for a flow that needs a certain one.
        shared_head: whether the experts share one head.
        router: config of the router, for a flow that trains one.
        image_size: height and width of the images that a model is tried on, in pixels.
    """

    config: Settings
    num_experts: int = 3
    objective: Settings | None = None
    head: Settings | None = None
    shared_head: bool = False
    router: Settings | None = None
    image_size: int = 40


def cases_of(kind: str, name: str, *args: Any) -> list[Case]:
    """Return a piece's cases: those it names in its classmethod `cases`, else its defaults.

    Args:
        kind, name: as registered.
        args: what `cases` of this kind takes; aggregators take the experts' names.
    """
    cls = piece(kind, name)
    found: list[Case] = cls.cases(*args) if hasattr(cls, "cases") else [Case(cls.Config())]
    return found
