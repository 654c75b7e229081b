"""The base of all heads.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Head(nn.Module):
    """Features [B, D] to scores [B, C]; built with its config, D, C and the expert's place among all, from 0.

    The config has `scale`, the factor of the scores: a field, or 1 as a constant of the class.
    """

    flow: ClassVar[str | None] = None
    """The one flow that it works with; None: any."""
