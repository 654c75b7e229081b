"""DisAlign: scores are calibrated as much as each image needs it.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experts.calibrations.calibration import Calibration
from experts.cases import Case
from experts.registry import Settings, register


@register("calibration", "disalign")
class DisAlign(Calibration):
    """A factor and an offset per class, and a confidence in (0, 1) per image that says how much they count.

    Shapes: scores z [B, C], features f [B, D], confidence s = sigmoid(f u + c) [B, 1].

    Source: Zhang et al. 2021, arXiv:2103.16370, section 3.2, and the published code.
    Differs: paper and code disagree, see `form`.
    """

    class Config(Settings):
        name: Literal["disalign"] = "disalign"
        form: Literal["published", "paper"] = "published"
        """published: (1 + s alpha) z + s beta, the code behind the released model, which starts from (1 + s) z; paper:
        s (alpha z + beta) + (1 - s) z, which starts from z."""

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: both forms."""
        return [Case(cls.Config()), Case(cls.Config(form="paper"))]

    def __init__(self, config: Config, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.form = config.form
        self.alpha_C = nn.Parameter(torch.ones(num_classes))
        self.beta_C = nn.Parameter(torch.zeros(num_classes))
        self.confidence_weight_D = nn.Parameter(torch.full((num_features,), 0.1))
        bound = 1 / math.sqrt(num_features)
        self.confidence_bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))

    def forward(self, scores_BC: Tensor, features_BD: Tensor) -> Tensor:
        confidence_B1 = F.linear(features_BD, self.confidence_weight_D[None], self.confidence_bias).sigmoid()
        if self.form == "published":
            return (1 + confidence_B1 * self.alpha_C) * scores_BC + confidence_B1 * self.beta_C
        return confidence_B1 * (self.alpha_C * scores_BC + self.beta_C) + (1 - confidence_B1) * scores_BC

    def extra_repr(self) -> str:
        return f"form={self.form}"
