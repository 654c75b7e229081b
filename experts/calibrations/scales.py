"""Learnable weight scaling: a factor for the score of each class.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from experts.calibrations.calibration import Calibration
from experts.registry import Settings, register


@register("calibration", "scales")
class Scales(Calibration):
    """Scores g_c z_c; the factors begin at 1 and may become negative.

    LWS freezes the head and learns the factors alone (`freeze: [trunk, features, heads]`).

    Source: Kang et al. 2020, arXiv:1910.09217, section 4.2.
    Differs: the paper scales a classifier without bias; the published code, and ours, scales the biased score.
    """

    class Config(Settings):
        name: Literal["scales"] = "scales"

    def __init__(self, config: Config, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.scale_C = nn.Parameter(torch.ones(num_classes))

    def forward(self, scores_BC: Tensor, features_BD: Tensor) -> Tensor:
        return self.scale_C * scores_BC
