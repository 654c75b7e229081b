"""Distribution-balanced loss: a sigmoid per class that tolerates negatives and weights what sampling over-represents.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from experts.losses.binary import binary_cross_entropy, focal_factor, one_hot
from experts.losses.counts import positive_counts
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import Settings, register

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Balance(Settings):
    """Numbers of the distribution-balanced loss."""

    offset: NotNegative = 0.1
    """alpha, added to the smoothed weight, no unit; published 0.1."""
    slope: NotNegative = 10.0
    """beta of the sigmoid that smooths the weight, no unit; published 10."""
    centre: float = Field(0.2, allow_inf_nan=False)
    """mu, where the sigmoid is a half, no unit; published 0.2 (COCO), 0.3 (VOC)."""
    bias: NotNegative = 0.05
    """kappa, strength of the shift by class, no unit; published 0.05."""
    tolerance: Positive = 2.0
    """lambda, multiplies scores of negatives and divides their weight, no unit; published 2 (COCO), 5 (VOC)."""


def rebalancing_weights(target_BC: Tensor, counts_C: Tensor, balance: Balance) -> Tensor:
    """Return offset + sigmoid(slope (r - centre)), r_ic = (1 / n_c) / sum_j 1 / n_j, j the image's classes; [B, C].

    r is the share of an image's draws under class-aware sampling that are on account of class c. Of an image with one
    class y it is n_y / n_c: its own class always has the same weight, and a rare class's image hardly pushes frequent
    classes down.

    Source: Wu et al. 2020, arXiv:2007.09654, section 3.1.
    """
    inverse_C = (1 / counts_C).to(target_BC.dtype)
    repeat_BC = inverse_C / (target_BC * inverse_C).sum(dim=-1, keepdim=True)
    return balance.offset + (balance.slope * (repeat_BC - balance.centre)).sigmoid()


def class_shift(counts_C: Tensor, balance: Balance) -> Tensor:
    """Return nu_c = -(kappa / lambda) log(N / n_c - 1), added to all scores of a class, float64 [C].

    Raises:
        ValueError: a class has no image.
    """
    counts_C = positive_counts(counts_C)
    return -(balance.bias / balance.tolerance) * (counts_C.sum() / counts_C - 1).log()


def distribution_balanced_loss(
    logits_EBC: Tensor, target_BC: Tensor, *, counts_C: Tensor, shift_C: Tensor, balance: Balance, focal: bool
) -> Tensor:
    """Return the loss of every image and class, nats [E, B, C].

    Args:
        logits_EBC: scores, at least float32.
        target_BC: 1 for the image's classes, 0 for others; an image has at least one.
        counts_C: training images per class, each at least 1.
        shift_C: see `class_shift`.
        balance: its numbers.
        focal: also multiply by 2 (1 - p_t)^2, which is differentiated.

    Source: Wu et al. 2020, arXiv:2007.09654, section 3, in the form of the published code.
    Differs: that code changes the scores in place.
    """
    scale_BC = target_BC + balance.tolerance * (1 - target_BC)
    scaled_EBC = (logits_EBC + shift_C.to(logits_EBC.dtype)) * scale_BC
    loss_EBC = binary_cross_entropy(scaled_EBC, target_BC)
    weight_BC = rebalancing_weights(target_BC, counts_C, balance) / scale_BC
    factor_EBC = 2 * focal_factor(scaled_EBC, target_BC, 2) if focal else 1.0
    return factor_EBC * weight_BC * loss_EBC


@register("objective", "distribution_balanced")
class DistributionBalanced(PerImage):
    """The distribution-balanced loss for images of one class each: the classes of an image are its label alone.

    It was published for images of several classes and class-aware sampling; nothing is published for this case.

    Source: Wu et al. 2020, arXiv:2007.09654.
    Differs: the published code takes the mean over images and classes; here the classes are summed as in the other
    sigmoid losses, unless `over_classes` says otherwise.
    """

    class Config(ObjectiveSettings, Balance):
        name: Literal["distribution_balanced"] = "distribution_balanced"
        focal: bool = True
        """Whether hard answers count more, by 2 (1 - p)^2, as published."""
        over_classes: Literal["sum", "mean"] = "sum"
        """Reduction over the classes of an image: "mean" as published; its gradient is C times smaller."""

        @property
        def gives_probabilities(self) -> bool:
            """Return False: the loss asks one question for each class, and its scores only rank them."""
            return False

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"focal": False, "over_classes": "mean", "tolerance": 5.0, "centre": 0.3},
    )
    shift_C: Tensor
    counts_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: they follow from config and counts, and an old checkpoint must not bring others.
        self.register_buffer("shift_C", class_shift(counts_C, config), persistent=False)
        self.register_buffer("counts_C", positive_counts(counts_C), persistent=False)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `distribution_balanced_loss` and `PerImage.per_image`."""
        del now
        loss_EBC = distribution_balanced_loss(
            logits_EBC,
            one_hot(labels_B, logits_EBC),
            counts_C=self.counts_C,
            shift_C=self.shift_C,
            balance=self.config,
            focal=self.config.focal,
        )
        return loss_EBC.sum(dim=-1) if self.config.over_classes == "sum" else loss_EBC.mean(dim=-1)
