"""Balanced softmax: cross-entropy of scores to which the logs of the class counts are added.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from experts.losses.counts import log_prior
from experts.losses.cross_entropy import negative_log_likelihood
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register


@register("objective", "balanced_softmax")
class BalancedSoftmax(PerImage):
    """Cross-entropy of z + log n in training; at test the plain scores, which answer for a balanced set.

    It equals `logit_adjustment` with tau 1, and has no number to set. The sampler must keep the training
    distribution, as n is that of the training set.

    Source: Ren et al. 2020, arXiv:2007.10740. Adding log n or log(n / N) is the same loss.
    """

    class Config(ObjectiveSettings):
        name: Literal["balanced_softmax"] = "balanced_softmax"

    log_prior_C: Tensor

    def __init__(self, config: Any, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from the counts, and an old checkpoint must not bring another.
        self.register_buffer("log_prior_C", log_prior(counts_C), persistent=False)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `PerImage.per_image`."""
        del now
        return negative_log_likelihood(logits_EBC + self.log_prior_C.to(logits_EBC.dtype), labels_B)
