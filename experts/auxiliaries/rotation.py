"""Guessing by how many right angles an image was turned, the pre-text task of RotNet.

Shapes: B images of the whole batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from experts.augmentation.quarter_turn import QuarterTurn
from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.progress import Progress
from experts.registry import register


@register("auxiliary", "rotation")
class Rotation(Auxiliary):
    """Cross-entropy of a linear classifier with four outputs, for the turn that augmentation `quarter_turn` has drawn.

    It needs no labels. Alone, beside objective `no_loss`, it trains a network before another stage does:
    see `configs/method/ssp_rotation.yaml`. What an objective sees is turned, too.

    Source: Gidaris et al. 2018, arXiv:1803.07728; as pre-training Yang and Xu 2020, arXiv:2006.07529.
    Differs: see `QuarterTurn`.
    """

    class Config(AuxiliarySettings):
        name: Literal["rotation"] = "rotation"

    guesses: ClassVar[str | None] = "quarter_turn"

    def __init__(self, config: Any, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.embed = nn.Linear(num_features, QuarterTurn.told_values)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """Return the mean over images, nats."""
        assert seen.told_B is not None
        return F.cross_entropy(seen.embedded_VBd[0], seen.told_B)
