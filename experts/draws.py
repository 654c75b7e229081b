"""Random numbers for objectives: of every image of a step, the same on every placement and after a resume.

Shapes: b images of one replica.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.data.keyed_random import uniforms


@dataclass(frozen=True)
class RowDraws:
    """Draws for one replica's images of one step, keyed by the image's row in the epoch.

    Attributes:
        key_of: takes words to a key; it knows seed and stage.
        epoch: counted from 1.
        first_row: row in the epoch of the replica's first image.
        images: b; their rows follow each other.
        device: where the draws go.
        label_set: 1 for the labels of the images that are blended in; a loss with draws has others for them.
    """

    key_of: Callable[..., int]
    epoch: int
    first_row: int
    images: int
    device: torch.device | str = "cpu"
    label_set: int = 0

    def __call__(self, what: str, width: int) -> Tensor:
        """Return uniform numbers in [0, 1), float64 [b, width].

        Args:
            what: name of the quantity that is drawn; another name gives other numbers.
            width: numbers for each image.
        """
        name = self.key_of(self.epoch, "objective", what, self.label_set)
        drawn = torch.from_numpy(uniforms(name, self.first_row, self.images, width))
        return drawn.to(self.device, non_blocking=True)
