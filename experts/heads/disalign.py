"""DisAlign's head: a linear head whose scores are calibrated as much as each image needs it.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experts.cases import Case
from experts.heads.head import Head
from experts.registry import Settings, register


class Calibration(nn.Module):
    """A factor and an offset per class, and a confidence in (0, 1) per image that says how much they count.

    Shapes: scores z [B, C], features f [B, D], confidence s = sigmoid(f u + c) [B, 1].
    """

    def __init__(self, form: Literal["published", "paper"], num_features: int, num_classes: int) -> None:
        super().__init__()
        self.form = form
        self.alpha_C = nn.Parameter(torch.ones(num_classes))
        self.beta_C = nn.Parameter(torch.zeros(num_classes))
        # Not an nn.Linear: a backbone that draws the weights of linear layers anew would change these.
        self.confidence_weight_D = nn.Parameter(torch.full((num_features,), 0.1))
        bound = 1 / math.sqrt(num_features)
        self.confidence_bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))

    def forward(self, logits_BC: Tensor, features_BD: Tensor) -> Tensor:
        """Return calibrated scores [B, C]."""
        confidence_B1 = F.linear(features_BD, self.confidence_weight_D[None], self.confidence_bias).sigmoid()
        if self.form == "published":
            return (1 + confidence_B1 * self.alpha_C) * logits_BC + confidence_B1 * self.beta_C
        return confidence_B1 * (self.alpha_C * logits_BC + self.beta_C) + (1 - confidence_B1) * logits_BC


@register("head", "disalign")
class DisAlignHead(nn.Linear, Head):
    """A linear head, calibrated: the second stage freezes it and learns the calibration alone.

    Source: Zhang et al. 2021, arXiv:2103.16370, section 3.2, and the published code.
    Differs: paper and code disagree, see `form`.
    """

    class Config(Settings):
        name: Literal["disalign"] = "disalign"
        scale: ClassVar[float] = 1.0
        form: Literal["published", "paper"] = "published"
        """With z the scores and s the confidence, published: (1 + s alpha) z + s beta, the code behind the released
        model, which starts from (1 + s) z; paper: s (alpha z + beta) + (1 - s) z, which starts from z."""

    continues: ClassVar[tuple[str, ...]] = ("linear", "tau_normalised")
    calibrates: ClassVar[bool] = True

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Head.cases`."""
        return [Case(cls.Config()), Case(cls.Config(form="paper"))]

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__(num_features, num_classes)
        self.calibration = Calibration(config.form, num_features, num_classes)

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.calibration(super().forward(features_BD), features_BD)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.calibration.form}"
