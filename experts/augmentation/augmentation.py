"""The base of all augmentations: pieces of kind "augmentation", each of which changes a batch of images at random.

A piece has no state. It draws nothing itself: what is random about an image is in the image's own row of uniform
numbers, whose columns the piece names. So an image's pixels do not depend on the batch or the replica that it is in.
Pieces act on all images at once, on the device, and the host waits for nothing.

    Move           moves whole pixels; moves in a row are one gather (moves.py)
    Augmentation   any other change, on bytes (0 .. 255) or on numbers (0 .. 1)

Shapes: B images, K columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from experts.augmentation.moves import Places
from experts.cases import Case
from experts.registry import Settings


class AugmentationSettings(Settings):
    """Base of the augmentations' configs."""

    @property
    def is_off(self) -> bool:
        """Whether the piece changes no image."""
        return False


class Piece:
    """Base of the augmentations' configs.

    Args:
        config: the `Config` of the class.
    """

    Config: ClassVar[Any]
    table: ClassVar[str | None] = None
    """Name of the table that its columns are drawn from; None: the registered name."""
    columns: tuple[str, ...] = ()
    """Names of its uniform numbers. Those in `stack.SHARED` come from a table that several pieces share, so that adding
    a piece changes no draw of another."""
    told_values: ClassVar[int] = 0
    """Number of values of `told`; 0: auxiliaries are told nothing."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the defaults."""
        return [Case(cls.Config())]

    def told(self, uniforms_BK: np.ndarray) -> np.ndarray:
        """Return what was drawn for each image, for auxiliaries that guess it: int64 [B] in [0, told_values).

        Args:
            uniforms_BK: float64 [B, K] in [0, 1), the columns that the piece names.
        """
        raise NotImplementedError(f"{type(self).__name__} has told_values, so it must define told")


class Move(Piece, ABC):
    """A change that moves whole pixels, or leaves a place black."""

    @abstractmethod
    def undo(self, places: Places, uniforms_BK: np.ndarray) -> None:
        """Take the places of pixels after the move to those before it.

        Args:
            places: written to.
            uniforms_BK: float64 [B, K] in [0, 1), the columns that the piece names.
        """


class Augmentation(Piece, ABC):
    """A change of pixels."""

    acts_on: ClassVar[Literal["bytes", "numbers", "both"]] = "numbers"
    """uint8 as published for images of 8 bits, floating point of 0 to 1, or either."""

    @abstractmethod
    def __call__(self, images_BcHW: Tensor, uniforms_BK: np.ndarray) -> Tensor:
        """Return the images changed.

        Args:
            images_BcHW: [B, 1 or 3, H, W] as bytes, [B, 3, H, W] as numbers; not written to.
            uniforms_BK: float64 [B, K] in [0, 1), the columns that the piece names.
        """
