"""Mixup: every image is blended with another one of its step, and their losses with the same weights.

Source: Zhang et al. 2018, arXiv:1710.09412, as in MiSLAS, H2T and GCL: one share for each step, whatever is larger.
"""

from __future__ import annotations

from typing import Literal

from experts.mixing.mixing import Alpha, Blend, Mixing, MixingSettings, Step
from experts.registry import register


@register("mixing", "mixup")
class Mixup(Mixing):
    """x = share x_i + (1 - share) x_j, j the partner of i in a random order of the step."""

    class Config(MixingSettings):
        name: Literal["mixup"] = "mixup"
        alpha: Alpha = 1.0
        """The share of the first image is drawn from Beta(alpha, alpha), once per step."""

    config: Config

    def blend(self, step: Step) -> Blend:
        """See `Mixing.blend`."""
        order_B = step.order("mixup order")
        share = step.generator("mixup share").betavariate(self.config.alpha, self.config.alpha)
        return Blend(share, step.labels_B, step.labels_B[order_B], order_B)
