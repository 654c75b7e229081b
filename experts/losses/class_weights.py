"""Class weights for any loss that is a mean over images: rules that make them from counts, and when they apply.

Deferred re-weighting (DRW) is such a block with `after_epoch`; weighted softmax is cross-entropy with the rule
`log_ratio` from the first epoch on.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from experts.losses.counts import log_prior, positive_counts
from experts.losses.effective_number import effective_number_weights
from experts.registry import Settings


def power_weights(counts_C: Tensor, *, rho: float, key: str = "rho") -> Tensor:
    """Return weights w_c = C pi_c^-rho / sum_j pi_j^-rho, whose sum is C.

    Args:
        counts_C: training images per class, each at least 1; only their ratios count.
        rho: power, no unit; 0 gives ones, 1 inverse frequency, -1 frequency; published: 1.2 (ImageNet-LT), 0.3
            (segmentation).
        key: that sets rho, for the message.

    Returns:
        float64 [C].

    Raises:
        ValueError: a class has no image, or rho is so large that a weight is 0 in float32.

    Source: Zhang et al. 2021, arXiv:2103.16370, section 3.3, scaled as in the published code.
    """
    # A softmax of logs: pi^-rho itself overflows where rho is large and a class rare.
    weight_C = len(counts_C) * (-rho * log_prior(counts_C)).softmax(dim=0)
    lightest = int(weight_C.argmin())
    if weight_C[lightest] < torch.finfo(torch.float32).tiny:  # a batch of such images would be divided by 0
        raise ValueError(
            f"{key} = {rho:g}: a class of {int(counts_C[lightest]):,} images weighs {float(weight_C[lightest]):.1g}, "
            f"which is nothing in float32; needed a smaller power of the inverse frequency; published 0.3 to 1.2"
        )
    return weight_C


def log_ratio_weights(counts_C: Tensor) -> Tensor:
    """Return weights w_c = 1 + ln(n_max / n_c): 1 for the most frequent class, more for rare ones.

    Args:
        counts_C: training images n per class, each at least 1; only their ratios count.

    Returns:
        float64 [C].

    Raises:
        ValueError: a class has no image.

    Source: Zhang et al. 2023, arXiv:2110.04596, published code ("weighted softmax"). It is no inverse frequency.
    """
    counts_C = positive_counts(counts_C)
    return 1 + (counts_C.max() / counts_C).log()


class ClassWeights(Settings):
    """Weights of the classes in a loss: every image counts as much as its class weighs.

    Source: Cao et al. 2019, arXiv:1906.07413, section 3 (the deferred schedule).
    """

    rule: Literal["effective_number", "power", "log_ratio"]
    """Rule from counts n to weights: inverse effective numbers (Cui et al. 2019), a power of the inverse
    frequency, or 1 + ln(n_max / n) (the survey's weighted softmax)."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Beta of `effective_number`, no unit; published 0.9999; 0 gives ones, towards 1 inverse frequency."""
    power: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Exponent of `power`, no unit; 1 is inverse frequency, -1 frequency, as DRO-LT weighs beside its own loss."""
    after_epoch: Annotated[int, Field(ge=0)] | None = None
    """They apply in epochs after this one (1-based); published for LDAM-DRW: 160 of 200. null: from the first on."""
    mean: Literal["weights", "images"] = "weights"
    """Divisor of the weighted sum: the "weights" of the batch's images, as published for LDAM-DRW and weighted
    softmax, or the number of "images", as the paper on effective numbers has it."""

    @model_validator(mode="after")
    def _only_the_rules_own_number(self) -> ClassWeights:
        own = {"effective_number": "beta", "power": "power"}.get(self.rule)
        for key in ("beta", "power"):
            if key != own and getattr(self, key) != type(self).model_fields[key].default:
                takes = f"takes {own} only" if own else "takes no number"
                raise ValueError(f"{key} = {getattr(self, key):g}: rule '{self.rule}' {takes}; remove {key}")
        return self

    def of(self, counts_C: Tensor) -> Tensor:
        """Return the weights, float64 [C].

        Raises:
            ValueError: a class has no image.
        """
        if self.rule == "effective_number":
            return effective_number_weights(counts_C, beta=self.beta)
        if self.rule == "power":
            return power_weights(counts_C, rho=self.power, key="class_weights.power")
        return log_ratio_weights(counts_C)

    def apply_in(self, epoch: int) -> bool:
        """Return whether they apply in an epoch, counted from 1."""
        return self.after_epoch is None or epoch > self.after_epoch

    @property
    def switches(self) -> dict[str, int]:
        """The epoch after which the loss changes for good, by its key."""
        return {} if self.after_epoch is None else {"after_epoch": self.after_epoch}


def trained_with(weight_C: Tensor, log_share_C: Tensor, num_experts: int) -> tuple[Tensor, tuple[str, ...]]:
    """Return the class distribution that softmaxes learn from weighted images; see `trained_log_prior` of objectives.

    Args:
        weight_C: weights of the classes, above 0.
        log_share_C: logs of each class's share of the training images.
        num_experts: E.
    """
    learnt_C = log_share_C + weight_C.log().to(log_share_C.dtype)
    word = "train" if bool((weight_C == weight_C[0]).all()) else "train, weighted"
    return learnt_C.repeat(num_experts, 1), (word,) * num_experts
