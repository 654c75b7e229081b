"""The causal classifier of De-confound: scores without what all images have in common.

Shapes: B images, D features, C classes, K groups of features.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from experts.cases import Case
from experts.directions import directions
from experts.heads.head import Head
from experts.precision import at_least_float32
from experts.registry import Settings, register


@register("head", "causal")
class CausalHead(Head):
    """Cosines in K groups of features; in evaluation without the features' part along their moving mean.

    With f^k the direction of an image's features in group k and w^k = W^k / (|W^k| + gamma) a class's weights, the
    score in training is (scale / K) sum_k f^k . w^k. Training moves all features along one direction, which favours
    frequent classes. In evaluation f^k is replaced by f^k - alpha cos(f^k, d^k) d^k, where d^k is the direction of the
    moving sum of batches' mean features, sum <- mu sum + mean.

    Source: Tang et al. 2020, arXiv:2009.12991, Eq. 7 to 9, and published code.
    Differs: published mu follows the learning rate of the epoch; ours that of the step. Published code divides by the
    length of d before its first step too, which is 0; ours leaves the features as they are.
    """

    class Config(Settings):
        name: Literal["causal"] = "causal"
        scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
        """Factor of the mean cosine, no unit; published 16."""
        groups: Annotated[int, Field(ge=1)] = 2
        """K, divides the number of features; published 2."""
        gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.03125
        """Added to the length of a class's weights; published 1/32."""
        alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3.0
        """Part of the common direction that is taken away in evaluation; published 3, CIFAR-100 1.5, CIFAR-10 1."""
        momentum: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
        """mu, part of the moving sum that stays in a step; published 0.9 for CIFAR. null: 1 - 0.1 min(50 lr, 1)."""

    flow: ClassVar[str | None] = "plain"
    own_per_expert: ClassVar[bool] = True
    evens: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    sum_D: Tensor

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Head.cases`."""
        return [Case(cls.Config()), Case(cls.Config(groups=1, momentum=0.9))]

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        if num_features % config.groups:
            raise ValueError(
                f"head 'causal': head.groups = {config.groups} does not divide the {num_features} features of an "
                f"expert; set a number that does"
            )
        self.config = config
        self.scale = config.scale
        self.weight = nn.Parameter((torch.rand(num_classes, num_features) * 2 - 1) / num_features**0.5)
        self.register_buffer("sum_D", torch.zeros(num_features))

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            direction_BKd = directions(self._grouped(at_least_float32(features_BD)), dim=-1)
            weight_CKd = self._grouped(self.weight.to(direction_BKd.dtype))
            weight_CKd = weight_CKd / (weight_CKd.norm(dim=-1, keepdim=True) + self.config.gamma)
            if not self.training:
                common_Kd = directions(self._grouped(self.sum_D.to(direction_BKd.dtype)), dim=-1)
                cosine_BK1 = (direction_BKd * common_Kd).sum(dim=-1, keepdim=True)
                direction_BKd = direction_BKd - self.config.alpha * cosine_BK1 * common_Kd
            return self.scale / self.config.groups * (direction_BKd.flatten(-2) @ weight_CKd.flatten(-2).T)

    def _grouped(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.config.groups, -1))

    def follow(self, mean_D: Tensor, lr: float, ok: Tensor) -> None:
        """See `Head.follow`."""
        kept = self.config.momentum
        part = 1 - 0.1 * min(50 * lr, 1) if kept is None else kept
        self.sum_D.copy_(torch.where(ok, part * self.sum_D + mean_D.to(self.sum_D.dtype), self.sum_D))

    def extra_repr(self) -> str:
        classes, features = self.weight.shape
        return f"features={features}, classes={classes}, groups={self.config.groups}, alpha={self.config.alpha:g}"
