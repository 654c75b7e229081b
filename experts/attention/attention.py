"""The base of all attentions, and how one is put on an expert.

Shapes: B images, D channels of a map of H x W positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any, ClassVar

from torch import Tensor, nn

from experts.cases import Case


class Attention(nn.Module, ABC):
    """A map to a map of the same shape; built with its config, D, and the side of the map.

    It is a part of the ensemble of its own, "attention", with its own `freeze` and `lr_factors`, in every stage.
    """

    Config: ClassVar[Any]

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the defaults, unless an attention has more ways."""
        return [Case(cls.Config())]

    @abstractmethod
    def forward(self, map_BDHW: Tensor) -> Tensor:
        """Return a map of the same shape."""


def put_before_pooling(features: Any, attention: Attention) -> None:
    """Let late stages that end in a map and its mean take the mean of what attention makes of the map."""
    features.pool = nn.Sequential(OrderedDict(attention=attention, mean=features.pool))
