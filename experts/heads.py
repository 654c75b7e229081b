"""Heads: pooled features to class scores.

Every head is built as (config, D, C, position); position is the expert's place from 0, and most heads ignore it.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.losses.precision import at_least_float32
from experts.registry import Settings, register


@register("head", "linear")
class LinearHead(nn.Linear):
    """Scores x W^T + b; weight [C, D]."""

    class Config(Settings):
        name: Literal["linear"] = "linear"
        scale: ClassVar[float] = 1.0

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__(num_features, num_classes)


@register("head", "tau_normalised")
class TauNormalisedHead(nn.Linear):
    """Linear in training; in evaluation x W'^T with every row of W divided by its norm to a power, and no bias.

    Frequent classes end training with longer rows; dividing takes that advantage away. A row of zeros scores 0.

    Source: Kang et al. 2020, arXiv:1910.09217, section 4.2; as ResLT (arXiv:2101.10633) and its published code use it
    in evaluation on ImageNet-LT and iNaturalist.
    Differs: ResLT's iNaturalist script evaluates with gamma 0 after training with gamma 0.3; ours is one number.
    """

    class Config(Settings):
        name: Literal["tau_normalised"] = "tau_normalised"
        scale: ClassVar[float] = 1.0
        gamma: float = Field(0.7, ge=0, allow_inf_nan=False)
        """Power of the norm, no unit: 0 keeps the rows, 1 gives all the same length. Published: 0.7 for ResNeXt-50 and
        -101, 0.3 for ResNet-10 and iNaturalist."""

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__(num_features, num_classes)
        self.gamma = config.gamma

    def forward(self, features_BD: Tensor) -> Tensor:
        if self.training:
            return super().forward(features_BD)
        weight_CD = at_least_float32(self.weight)
        norm_C1 = weight_CD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return F.linear(features_BD, (weight_CD / norm_C1**self.gamma).to(features_BD.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma:g}"


@register("head", "cosine")
class CosineHead(nn.Module):
    """Scores s cos(x, w_c), without bias; weight [D, C], a column per class.

    Norms below 1e-12 count as 1e-12, so a feature vector of zeros scores 0 for every class. Computed outside autocast:
    the scale would turn a half type's rounding of a cosine into tenths of a logit.

    Source: Cao et al. 2019, arXiv:1906.07413 and published code, as RIDE uses it with the scale inside the model.
    """

    class Config(Settings):
        name: Literal["cosine"] = "cosine"
        scale: float = Field(30.0, gt=0, allow_inf_nan=False)
        """s, what the cosines are multiplied with, no unit; objectives with margins need the same number."""

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        self.scale = config.scale
        # Uniform directions: drawn in (-1, 1), every column brought to length 1.
        self.weight = nn.Parameter(F.normalize(torch.rand(num_features, num_classes) * 2 - 1, dim=0))

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            direction_BD = F.normalize(at_least_float32(features_BD), dim=1)
            return self.scale * (direction_BD @ F.normalize(self.weight.to(direction_BD.dtype), dim=0))

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[0]}, classes={self.weight.shape[1]}, scale={self.scale:g}"
