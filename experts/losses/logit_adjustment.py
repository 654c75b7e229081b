"""Logit adjustment in training: cross-entropy of scores to which the class frequencies are added.

The correction of scores after training is `aggregation/logit_adjusted.py`. A model needs one of the two, never both.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from experts.losses.counts import log_prior
from experts.losses.cross_entropy import negative_log_likelihood
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register


@register("objective", "logit_adjustment")
class LogitAdjustment(PerImage):
    """Cross-entropy of z + tau log pi; at test the plain scores answer for a balanced set.

    pi are the shares of the training set. So the sampler must keep them: after class-balanced draws the images are
    uniform, and adding log pi would correct what the sampler has corrected.

    Source: Menon et al. 2021, arXiv:2007.07314; tau 1 is the balanced softmax of Ren et al. 2020, arXiv:2007.10740.
    Differs: published code has log(pi^tau + 1e-12); we refuse empty classes. Same to 1e-12 / pi^tau.
    """

    class Config(ObjectiveSettings):
        name: Literal["logit_adjustment"] = "logit_adjustment"
        tau: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
        """Strength, no unit; published 1, and values tuned for each data set; 0 is plain cross-entropy."""

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return pi^(1 - tau), uniform for tau 1. See `ObjectiveSettings.trained_log_prior`."""
            del counts_C
            left = 1 - self.tau
            word = "uniform" if left == 0 else "train" if left == 1 else f"train^{left:g}"
            return (left * log_share_C).repeat(num_experts, 1), (word,) * num_experts

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tau": 1.5},)
    log_prior_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from the counts, and an old checkpoint must not bring another.
        self.register_buffer("log_prior_C", log_prior(counts_C), persistent=False)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `PerImage.per_image`."""
        del now
        shift_C = (self.config.tau * self.log_prior_C).to(logits_EBC.dtype)
        return negative_log_likelihood(logits_EBC + shift_C, labels_B)
