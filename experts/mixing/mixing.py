"""The base of all mixings: pieces of kind "mixing", which blend images and give them two sets of labels.

A mixing draws once for a whole step, of all replicas, on the host. Its draws are keyed by seed, stage, epoch, stream
and step, so every placement blends the same pairs. The loss of a blend is share L(z, first) + (1 - share) L(z, second),
with one share for all images of the step. Losses of the whole batch, class weights and graphs need nothing more.

Shapes: B images of a step, of all replicas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from experts.cases import Case
from experts.data.keyed_random import KeyedRandom, permutation
from experts.progress import Progress
from experts.registry import Settings


@dataclass(frozen=True)
class Blend:
    """How the images of one step are mixed.

    Attributes:
        share: weight of the first labels, in [0, 1]; also of the images' own pixels.
        first_B, second_B: labels, int64. Usually of the images and of their partners.
        order_B: rows of the partners in the step.
    """

    share: float
    first_B: np.ndarray
    second_B: np.ndarray
    order_B: np.ndarray


@dataclass(frozen=True)
class Step:
    """All that a mixing may look at when it mixes a step.

    Attributes:
        labels_B: of the images, int64.
        now: the moment of the step.
        key_of: takes a name to the key of its draws in this epoch. It knows nothing of replicas.
    """

    labels_B: np.ndarray
    now: Progress
    key_of: Callable[[str], int]

    def order(self, name: str) -> np.ndarray:
        """Return a random order of the step's images, int64 [B]; another name gives another one."""
        return permutation(self.key_of(f"{name}/{self.now.step}"), len(self.labels_B))

    def generator(self, name: str) -> KeyedRandom:
        """Return a generator of the step's own; another name gives another one."""
        return KeyedRandom(self.key_of(f"{name}/{self.now.step}"))


class MixingSettings(Settings):
    """Base of the mixings' configs."""


class Mixing(ABC):
    """One way to mix the images of a step.

    Args:
        config: the `Config` of the class.
        counts_C: training images per class, int64.
    """

    Config: ClassVar[Any]

    def __init__(self, config: Any, counts_C: np.ndarray) -> None:
        self.config = config
        self.counts_C = counts_C

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the defaults."""
        return [Case(cls.Config())]

    @abstractmethod
    def blend(self, step: Step) -> Blend:
        """Return how a step is mixed, which depends on the arguments alone."""
