"""Remix: images are blended as by mixup, but a label may go to the rarer class alone.

Source: Chou et al., ECCV workshops 2020, arXiv:2007.03943. No code of the authors was at hand; the formula is the
paper's.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experts.mixing.mixing import Alpha, Blend, Mixing, MixingSettings, Step
from experts.registry import register


def label_shares(share: float, counts_B: np.ndarray, partners_B: np.ndarray, *, kappa: float, tau: float) -> np.ndarray:
    """Return the weight of each image's own label, float64 [B]; the rest is its partner's.

    Args:
        share: weight of the images' own pixels, in [0, 1].
        counts_B: training images of each image's class.
        partners_B: of its partner's class.
        kappa: times that one class must be as large as the other, for the other to take the whole label.
        tau: weight below which the larger class's pixels must be.

    Source: Eq. 4 of the paper.
    """
    ratio_B = counts_B / partners_B
    takes_partners_B = (ratio_B >= kappa) & (share < tau)
    takes_own_B = (ratio_B <= 1 / kappa) & (1 - share < tau)
    return np.select([takes_partners_B, takes_own_B], [0.0, 1.0], default=share)


@register("mixing", "remix")
class Remix(Mixing):
    """x = share x_i + (1 - share) x_j; the label of the rarer class alone where the larger one's pixels are weak.

    An image that takes its partner's label alone has it in both sets of labels, and one that keeps its own has that one
    twice. So one weight serves the whole step, and the loss is the paper's for whatever is a mean over images. How
    class weights enter it the paper leaves open. Here each of the two sets has its own weighted mean, our choice.
    """

    class Config(MixingSettings):
        name: Literal["remix"] = "remix"
        alpha: Alpha = 1.0
        """The share of the first image is drawn from Beta(alpha, alpha), once per step."""
        kappa: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
        """Ratio of two classes' counts from which the rarer one may take the whole label."""
        tau: Annotated[float, Field(ge=0, le=1)] = 0.5
        """It does so where the other image has less than this share of the pixels."""

    config: Config

    def blend(self, step: Step) -> Blend:
        """See `Mixing.blend`."""
        order_B = step.order("remix order")
        share = step.generator("remix share").betavariate(self.config.alpha, self.config.alpha)
        own_B, partners_B = step.labels_B, step.labels_B[order_B]
        of_own_B = label_shares(
            share, self.counts_C[own_B], self.counts_C[partners_B], kappa=self.config.kappa, tau=self.config.tau
        )
        first_B = np.where(of_own_B == 0, partners_B, own_B)
        second_B = np.where(of_own_B == 1, own_B, partners_B)
        return Blend(share, first_B, second_B, order_B)
