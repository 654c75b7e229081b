"""Generalised re-weighting: cross-entropy with class weights that are a power of the class frequencies.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.losses.class_weights import power_weights, trained_with
from experts.losses.cross_entropy import cross_entropy
from experts.objective import Objective, ObjectiveSettings, StepContext
from experts.progress import Progress
from experts.registry import register


@register("objective", "grw")
class GeneralisedReweighting(Objective):
    """Cross-entropy weighted by a power of the inverse class frequency: the loss of DisAlign's second stage.

    The mean is weighted: divided by the sum of the weights of the global batch, not by its images.

    Source: Zhang et al. 2021, arXiv:2103.16370, section 3.3.
    """

    class Config(ObjectiveSettings):
        name: Literal["grw"] = "grw"
        rho: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.2
        """Power of the inverse frequency, no unit; published 1.2 for ImageNet-LT. Above 1 the weights are steep."""

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return the weighted training distribution. See `ObjectiveSettings.trained_log_prior`."""
            return trained_with(power_weights(counts_C, rho=self.rho), log_share_C, num_experts)

    why_not_weighable: ClassVar[str] = " beside its own"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"rho": 0.5},)
    weight_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from config and counts, and an old checkpoint must not bring another.
        self.register_buffer("weight_C", power_weights(counts_C, rho=config.rho, key="objective.rho"), persistent=False)

    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return `class_weight`, the sum of the labels' weights."""
        del progress
        return {"class_weight": self.weight_C[labels_B].sum(dtype=torch.float64)}

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over experts of the weighted mean; term `grw` [E]. See `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        loss_E = cross_entropy(
            logits_EBC, labels_B, denominator=now.denominators["class_weight"], weight_C=self.weight_C
        )
        return loss_E.sum(), {"grw": loss_E.detach()}
