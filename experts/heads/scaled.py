"""The linear head with a factor per class: learnable weight scaling.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from experts.heads.head import Head
from experts.registry import Settings, register


@register("head", "scaled")
class ScaledHead(nn.Linear, Head):
    """Scores g_c (x w_c + b_c): a linear head and one factor per class, from 1 on. Factors may become negative.

    LWS freezes weights and biases of a trained head and learns the factors alone (`freeze: [..., heads]`).

    Source: Kang et al. 2020, arXiv:1910.09217, section 4.2.
    Differs: the paper scales a classifier without bias; the published code, and ours, scales the biased score.
    """

    class Config(Settings):
        name: Literal["scaled"] = "scaled"
        scale: ClassVar[float] = 1.0

    continues: ClassVar[tuple[str, ...]] = ("linear", "tau_normalised")
    calibrates: ClassVar[bool] = True

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__(num_features, num_classes)
        self.calibration = nn.ParameterDict({"scale_C": torch.ones(num_classes)})

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.calibration["scale_C"] * super().forward(features_BD)
