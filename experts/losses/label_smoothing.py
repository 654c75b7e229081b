"""Label-aware smoothing: frequent classes' labels are smoothed more than rare ones'.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.losses.counts import positive_counts
from experts.losses.cross_entropy import of_label
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register

Shape = Literal["concave", "linear", "convex", "exp"]


def smoothing_factors(counts_C: Tensor, *, head: float, tail: float, shape: Shape, power: float = 2.0) -> Tensor:
    """Return eps_c, from `tail` for the rarest class to `head` for the most frequent one.

    With x = (n_c - min n) / (max n - min n): tail + (head - tail) times sin(pi x / 2) (concave), x (linear),
    1 - cos(pi x / 2) (convex) or x^power (exp). With equal counts x is 1.

    Args:
        counts_C: training images n per class, each at least 1; only their ratios count.
        head, tail: factors of the most frequent and the rarest class, in [0, 1].
        shape: of the curve between.
        power: of "exp".

    Returns:
        float64 [C].

    Raises:
        ValueError: a class has no image.

    Source: Zhong et al. 2021, arXiv:2104.00466, section 3.3, and published code.
    """
    counts_C = positive_counts(counts_C)
    spread = counts_C.max() - counts_C.min()
    x_C = (counts_C - counts_C.min()) / spread if spread else torch.ones_like(counts_C)
    if shape == "concave":
        curve_C = (math.pi / 2 * x_C).sin()
    elif shape == "convex":
        curve_C = 1 - (math.pi / 2 * x_C).cos()
    else:
        curve_C = x_C if shape == "linear" else x_C**power
    return tail + (head - tail) * curve_C


@register("objective", "las")
class LabelAwareSmoothing(PerImage):
    """(1 - eps_y) times the cross-entropy of the label, and eps_y times that of a uniform distribution.

    Source: Zhong et al. 2021, arXiv:2104.00466, section 3.3; the loss of MiSLAS's second stage.
    Differs: the paper spreads eps over the other classes, its code over all; `over` says which.
    """

    class Config(ObjectiveSettings):
        name: Literal["las"] = "las"
        head: Annotated[float, Field(ge=0, lt=1)] = 0.3
        """Smoothing of the most frequent class; published 0.3 (ImageNet-LT, iNaturalist, CIFAR-10 at ratio 100), 0.4
        (Places-LT, CIFAR-100 at ratio 100)."""
        tail: Annotated[float, Field(ge=0, lt=1)] = 0.0
        """Smoothing of the rarest class; published 0, and 0.1 where the head has 0.4."""
        shape: Shape = "concave"
        """Shape of the curve between the two, by image count; published "concave"."""
        power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
        """Exponent of the shape "exp", no unit."""
        over: Literal["all", "others"] = "all"
        """The classes that share eps: "all", the label's too (code), or the "others" (paper)."""

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"head": 0.4, "tail": 0.1, "over": "others"},
        {"shape": "exp", "power": 3.0},
        {"shape": "convex"},
        {"shape": "linear"},
    )
    smoothing_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        smoothing_C = smoothing_factors(
            counts_C, head=config.head, tail=config.tail, shape=config.shape, power=config.power
        )
        # Not persistent: it follows from config and counts, and an old checkpoint must not bring another.
        self.register_buffer("smoothing_C", smoothing_C, persistent=False)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `PerImage.per_image`."""
        del now
        nll_EBC = -logits_EBC.log_softmax(dim=-1)
        own_EB = of_label(nll_EBC, labels_B)
        if self.config.over == "all":
            spread_EB = nll_EBC.mean(dim=-1)
        else:
            spread_EB = (nll_EBC.sum(dim=-1) - own_EB) / (self.num_classes - 1)
        smoothing_B = self.smoothing_C.to(nll_EBC.dtype)[labels_B]
        return (1 - smoothing_B) * own_EB + smoothing_B * spread_EB
