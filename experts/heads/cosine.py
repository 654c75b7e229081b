"""The cosine head.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.directions import directions
from experts.heads.head import Head
from experts.precision import at_least_float32
from experts.registry import Settings, register


@register("head", "cosine")
class CosineHead(Head):
    """Scores s cos(x, w_c), without bias; weight [D, C], a column per class.

    Norms below 1e-12 count as 1e-12, so a feature vector of zeros scores 0 for every class. Computed outside autocast:
    the scale would turn a half type's rounding of a cosine into tenths of a logit.

    Source: Cao et al. 2019, arXiv:1906.07413 and published code, as RIDE uses it with the scale inside the model.
    """

    class Config(Settings):
        name: Literal["cosine"] = "cosine"
        scale: float = Field(30.0, gt=0, allow_inf_nan=False)
        """s, the factor of the cosines, no unit; objectives with margins need the same number."""

    class_axis: ClassVar[int] = 1

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        self.scale = config.scale
        # Uniform directions: drawn in (-1, 1), every column brought to length 1.
        self.weight = nn.Parameter(F.normalize(torch.rand(num_features, num_classes) * 2 - 1, dim=0))

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            direction_BD = directions(at_least_float32(features_BD), dim=-1)
            return self.scale * (direction_BD @ directions(self.weight.to(direction_BD.dtype), dim=0))

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[0]}, classes={self.weight.shape[1]}, scale={self.scale:g}"
