"""The projections of contrastive auxiliaries.

Shapes: B images of one replica, D features, d numbers of an embedding.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from experts.directions import directions
from experts.precision import at_least_float32

Layers = Literal["linear", "mlp", "mlp_batchnorm"]
"""One linear layer; two with a ReLU between; and with BatchNorm before the ReLU."""


class Projection(nn.Module):
    """Features to directions in d dimensions.

    Args:
        layers: see `Layers`; hidden layers are as wide as the features.
        width: D.
        dim: d.
    """

    def __init__(self, layers: Layers, width: int, dim: int) -> None:
        super().__init__()
        self.hidden = None if layers == "linear" else nn.Linear(width, width)
        # Always with the statistics of the batch: no projection is evaluated, so running ones would serve nobody.
        self.norm = nn.BatchNorm1d(width, track_running_stats=False) if layers == "mlp_batchnorm" else None
        self.last = nn.Linear(width, dim)

    def forward(self, features_BD: Tensor) -> Tensor:
        x = features_BD
        if self.hidden is not None:
            x = F.relu(self._normalised(self.hidden(x)))
        return directions(at_least_float32(self.last(x)), dim=-1)

    def _normalised(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        if len(x) == 1 and not getattr(self.norm, "exchanges", False):  # torch refuses to normalise one value
            return (x - x) * self.norm.weight + self.norm.bias
        normalised: Tensor = self.norm(x)
        return normalised
