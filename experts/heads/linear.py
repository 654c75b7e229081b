"""The linear head.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from experts.heads.head import Head
from experts.registry import Settings, register


@register("head", "linear")
class LinearHead(nn.Linear, Head):
    """Scores x W^T + b; weight [C, D]."""

    class Config(Settings):
        name: Literal["linear"] = "linear"
        scale: ClassVar[float] = 1.0

    continues: ClassVar[tuple[str, ...]] = ("tau_normalised",)

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__(num_features, num_classes)
