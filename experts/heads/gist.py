"""The classifier of GistNet: a class is a centre and displaced copies of it, by displacements that all classes share.

Shapes: B images, D features, C classes, S displacements.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.directions import directions
from experts.heads.head import Head
from experts.precision import at_least_float32
from experts.registry import Settings, register


@register("head", "gist")
class GistHead(Head):
    """Scores t max over {w_c, w_c + d_1, ..., w_c + d_S} of cos(x, .), without bias; t is learnt.

    Source: Liu et al. 2021, ICCV, arXiv:2105.00131, section 3, and published code.
    Differs: published displacements begin at zero, where all copies of a class tie and none ever gets a gradient; ours
    begin with a small length. Published t begins at a random number, which may be negative; ours at `initial_scale`.
    The second branch of GistNet, for class-balanced images, is not part of the head.
    """

    class Config(Settings):
        name: Literal["gist"] = "gist"
        scale: ClassVar[float] = 1.0  # its own is learnt, so that no objective can rely on it
        displacements: Annotated[int, Field(ge=1)] = 4
        """S, shared by all classes; published 4."""
        initial_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
        """t before the first step, no unit."""
        initial_length: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
        """Length of the displacements before the first step, in that of a class's weights."""

    class_axis: ClassVar[int] = 1

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        # Uniform directions of length 1, as the cosine head's.
        self.weight = nn.Parameter(F.normalize(torch.rand(num_features, num_classes) * 2 - 1, dim=0))
        directions_SD = F.normalize(torch.rand(config.displacements, num_features) * 2 - 1, dim=1)
        self.displacement_SD = nn.Parameter(config.initial_length * directions_SD)
        # Of shape [1]: flat partitions and files of tensors want a first axis.
        self.learnt_scale = nn.Parameter(torch.full((1,), config.initial_scale))

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            direction_BD = directions(at_least_float32(features_BD), dim=-1)
            weight_CD = self.weight.to(direction_BD.dtype).T
            displacement_SD = self.displacement_SD.to(direction_BD.dtype)
            copies = torch.cat([weight_CD[None], weight_CD + displacement_SD[:, None]])  # [S + 1, C, D]
            # One product with all rows; [B, C, S + 1, D] would not fit in memory for many classes.
            cosines = direction_BD @ directions(copies, dim=-1).flatten(0, 1).T
            best_BC = cosines.unflatten(-1, copies.shape[:2]).max(dim=-2).values
            return self.learnt_scale.to(best_BC.dtype) * best_BC

    def extra_repr(self) -> str:
        features, classes = self.weight.shape
        return f"features={features}, classes={classes}, displacements={len(self.displacement_SD)}"
